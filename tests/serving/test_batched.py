"""Requests that run at once get what the model says to each alone, or run one at a time."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from moe_tools.inference.optimized import optimize
from moe_tools.inference.prompt import select_by_prompt
from moe_tools.serving import batched
from moe_tools.serving.batched import Batched, CannotBatch, check_seams, prove
from moe_tools.serving.engine import Engine
from moe_tools.serving.one_by_one import OneByOne
from moe_tools.serving.order import End, Order
from moe_tools.serving.sampling import Sampling
from moe_tools.serving.serve import choose
from moe_tools.serving.sparsity import Watch
from tests.families import build, randomize, routed

PROMPTS = [list(range(3, 3 + length)) for length in (1, 2, 5, 9, 14, 20, 33, 40)]
NONE: frozenset[int] = frozenset()


def model_of(family: str, *, is_routed: bool = True, packed: bool = False) -> PreTrainedModel:
    torch.manual_seed(1)
    model = build(family)
    model.generation_config.eos_token_id = None
    if is_routed:
        model, _ = routed(model)
        randomize(model)
    return optimize(model) if packed else model


def alone(model: Any, prompt: list[int], new: int) -> list[int]:
    ids_BT = torch.tensor([prompt])
    mask = torch.ones_like(ids_BT)
    said = model.generate(
        input_ids=ids_BT, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return said[0, len(prompt) :].tolist()


async def answer(engine: Engine, name: str, prompt: list[int], new: int, ends: Any = NONE) -> Any:
    order = Order(name, prompt, new, ends, Sampling())
    engine.submit(order)
    tokens = []
    while not isinstance(token := await order.heard.get(), End):
        tokens.append(token)
    assert token.error is None, token.error
    return tokens, order


def together(engine: Engine, prompts: list[list[int]], new: int) -> list[list[int]]:
    async def work() -> list[Any]:
        named = enumerate(prompts)
        return await asyncio.gather(*(answer(engine, f"{n}", each, new) for n, each in named))

    return [tokens for tokens, _ in asyncio.run(work())]


@pytest.mark.parametrize(
    ("family", "packed"),
    [
        ("llama", False),
        ("llama", True),
        ("opt", False),  # learnt positions
        ("mistral", True),
        pytest.param("gemma", True, marks=pytest.mark.slow),
        pytest.param("qwen2", True, marks=pytest.mark.slow),
        pytest.param("gpt_neox", False, marks=pytest.mark.slow),
        pytest.param("mistral", False, marks=pytest.mark.slow),
    ],
)
def test_a_batch_says_what_the_model_says(family: str, packed: bool) -> None:
    model = model_of(family, packed=packed)
    expected = [alone(model, prompt, 10) for prompt in PROMPTS]
    engine = choose(model, Watch(model), "auto", 8)
    try:
        assert together(engine, PROMPTS, 10) == expected
        assert isinstance(engine, Batched)
    finally:
        engine.stop()
    assert alone(model, PROMPTS[3], 10) == expected[3]  # attention is as it was


def test_a_long_prompt_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    expected = [alone(model, prompt, 6) for prompt in PROMPTS]
    monkeypatch.setattr(batched, "PASS", 8)
    engine = Batched(model, Watch(model), 8)
    try:
        assert together(engine, PROMPTS, 6) == expected
    finally:
        engine.stop()


def test_a_token_that_ends_a_text_is_the_last() -> None:
    model = model_of("llama")
    expected = alone(model, PROMPTS[2], 12)
    for engine in (Batched(model, Watch(model), 2), OneByOne(model, Watch(model))):
        try:
            tokens, _ = asyncio.run(
                answer(engine, "x", PROMPTS[2], 12, frozenset([expected[4], 10_000]))
            )
            assert tokens == expected[: expected.index(expected[4]) + 1]
        finally:
            engine.stop()


def test_neurons_are_counted_alike_in_both_ways() -> None:
    model = model_of("llama")
    shares = []
    for kind in ("on", "off"):
        engine = choose(model, Watch(model), kind, 4)  # type: ignore[arg-type]
        try:
            _, order = asyncio.run(answer(engine, "x", PROMPTS[4], 8))
        finally:
            engine.stop()
        assert order.alone
        shares.append(order.counted)
    assert shares[0] == shares[1]
    assert 0.2 < (shares[0].sparsity or 0) < 0.8


def test_requests_that_met_share_what_was_counted() -> None:
    model = model_of("llama")
    engine = Batched(model, Watch(model), 4)

    async def work() -> list[Any]:
        return await asyncio.gather(*(answer(engine, f"{n}", [3, 4], 8) for n in range(3)))

    try:
        assert not any(order.alone for _, order in asyncio.run(work()))
    finally:
        engine.stop()


def test_what_is_cancelled_leaves_nothing() -> None:
    model = model_of("llama")
    engine = Batched(model, Watch(model), 8)

    async def work() -> None:
        orders = [Order(f"{n}", [3 + n], 10_000, NONE, Sampling(1.0)) for n in range(8)]
        for order in orders:
            engine.submit(order)
        await asyncio.gather(*(order.heard.get() for order in orders))
        for order in orders:
            engine.cancel(order)
        for order in orders:
            while not isinstance(await order.heard.get(), End):
                pass

    try:
        asyncio.run(work())
        held = engine._manager.batch_processor.scheduler
        end = time.monotonic() + 20
        while held.active_requests or held.waiting_requests:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert engine.running == 0
        assert not (engine._shown or engine._before or engine._choice._choosers)
        assert not engine._manager.output_router.result_handlers
        assert together(engine, [[3, 4]], 4) == [alone(model, [3, 4], 4)]
    finally:
        engine.stop()


def test_a_stopped_engine_leaves_no_thread_and_ends_what_runs() -> None:
    model, before = model_of("llama"), set(threading.enumerate())
    for kind in ("on", "off"):
        engine = choose(model, Watch(model), kind, 4)  # type: ignore[arg-type]

        async def work(engine: Engine = engine) -> list[str | None]:
            orders = [Order(f"{n}", [3], 10_000, NONE, Sampling()) for n in range(3)]
            for order in orders:
                engine.submit(order)
            await orders[0].heard.get()
            await asyncio.to_thread(engine.stop)
            ends = []
            for order in orders:
                while not isinstance(token := await order.heard.get(), End):
                    pass
                ends.append(token.error)
            return ends

        assert asyncio.run(work()) == ["the server stops"] * 3
        assert not engine.alive
    assert set(threading.enumerate()) <= before
    assert not any(getattr(module, "observers", None) for module in model.modules())


def test_memory_does_not_grow_with_requests() -> None:
    model = model_of("llama")
    engine = Batched(model, Watch(model), 8)
    try:
        together(engine, PROMPTS * 2, 8)
        gc.collect()
        before = len(gc.get_objects())
        cache = engine._manager.batch_processor.cache
        for _ in range(4):
            together(engine, PROMPTS * 4, 8)
        gc.collect()
        assert len(gc.get_objects()) - before < 3000  # 128 requests
        assert cache.compute_free_capacity() > 0.5
    finally:
        engine.stop()


def test_neurons_by_the_prompt_are_of_one_text_at_a_time() -> None:
    model = model_of("llama", is_routed=False)
    with select_by_prompt(model, 0.5):
        expected = [alone(model, prompt, 6) for prompt in PROMPTS]
        engine = choose(model, Watch(model), "auto", 8)
        try:
            assert isinstance(engine, OneByOne)
            assert together(engine, PROMPTS, 6) == expected
            _, order = asyncio.run(answer(engine, "x", PROMPTS[5], 6))
            assert order.counted.sparsity == pytest.approx(0.5, abs=0.02)
        finally:
            engine.stop()
        with pytest.raises(ValueError, match="cannot run at once: it selects its neurons by the"):
            choose(model, Watch(model), "on", 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_reads_whole_texts_runs_one_at_a_time(
    attention: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("llama")
    model.set_attn_implementation(attention)
    model.generation_config.repetition_penalty = 1.3
    expected = [alone(model, prompt, 8) for prompt in PROMPTS]
    with caplog.at_level("INFO", "moe_tools"):
        engine = choose(model, Watch(model), "auto", 8)
    try:
        assert "asks for RepetitionPenaltyLogitsProcessor" in caplog.text
        assert together(engine, PROMPTS, 8) == expected
        assert model.config._attn_implementation == attention
    finally:
        engine.stop()


def test_a_model_that_batches_wrongly_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    prove(model)
    real = batched._answers
    wrong = [
        lambda *args: [[*said[1:], 5] for said in real(*args)],  # other tokens
        lambda *args: [said[:-1] for said in real(*args)],  # too few
    ]
    for answers in wrong:
        monkeypatch.setattr(batched, "_answers", answers)
        with pytest.raises(CannotBatch, match="continues texts otherwise in a batch"):
            prove(model)

    def fails(*_: Any) -> Any:
        raise RuntimeError("no such attention")

    monkeypatch.setattr(batched, "_answers", fails)
    with pytest.raises(CannotBatch, match="transformers cannot batch it: no such attention"):
        prove(model)


def test_a_model_without_attention_runs_one_at_a_time() -> None:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)
    model = transformers.MambaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    engine = choose(model, Watch(model, 0), "auto", 8)
    try:
        assert isinstance(engine, OneByOne)
    finally:
        engine.stop()


def test_a_request_has_no_more_room_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    page = batched.PAGE * batched._bytes_of_token(model)
    memory = type("Memory", (), {"available": 4 * page / batched.SHARE + 1})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert batched._room(model, 64)[0] == 4
    memory.available = page
    with pytest.raises(CannotBatch, match="hold no KV cache of it"):
        batched._room(model, 64)


def test_requests_that_fill_the_cache_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    expected = [alone(model, prompt, 30) for prompt in PROMPTS]
    monkeypatch.setattr(batched, "_room", lambda *_: (2, 64))
    engine = Batched(model, Watch(model), 8)
    try:
        assert together(engine, PROMPTS, 30) == expected
    finally:
        engine.stop()


def test_a_transformers_that_batches_in_another_way_is_told_by_name() -> None:
    class Other:
        logit_processor = None

    with pytest.raises(CannotBatch, match="batches in another way than moe-tools knows: the man"):
        check_seams(Other())
    model = model_of("llama")
    manager = batched.manager_of(model, batched.Choice(model.device, Watch(model)), 2)
    check_seams(manager)
    manager.logit_processor = object()
    with pytest.raises(CannotBatch, match="its processors' logits_processor and"):
        check_seams(manager)


def test_an_order_that_fails_leaves_the_next_alone() -> None:
    model: Any = model_of("llama")
    engine = OneByOne(model, Watch(model))
    try:

        async def work() -> str | None:
            order = Order("x", [10**6], 4, NONE, Sampling())
            engine.submit(order)
            end = await order.heard.get()
            assert isinstance(end, End)
            return end.error

        assert "out of range" in (asyncio.run(work()) or "")
        assert together(engine, [[3, 4]], 4) == [alone(model, [3, 4], 4)]
    finally:
        engine.stop()
