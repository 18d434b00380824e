"""Held-out text in the course of a train step: what is measured, and that nothing is disturbed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from moe_tools import processes
from moe_tools.data import Batch
from moe_tools.experts.conversion import set_mode
from moe_tools.experts.experts import expert_ffns
from moe_tools.recipe import Lora, Train
from moe_tools.steps.launch import Launch
from moe_tools.training.held_out import HeldOut
from moe_tools.training.train import train
from tests.families import build
from tests.killed import Killed, kill_at
from tests.training.test_train import (
    DENSE,
    HARD,
    SOFT,
    WEIGHTED,
    converted,
    equal,
    language_loss,
    text,
)
from tests.training.test_trainer import many_experts

HELD_OUT = text(300)[250:]
STEPS: dict[str, Train] = {
    "dense": DENSE,
    "soft, shift": replace(SOFT, target_sparsity=0.4),
    "soft, eta": replace(SOFT, target_sparsity=0.4, drive="eta"),
    "straight": replace(SOFT, mode="straight"),
    "weighted": WEIGHTED,
    "hard": replace(HARD, target_sparsity=0.4),
    "accumulated": replace(SOFT, batch_size=2, accumulate=2),
    "recomputed": replace(SOFT, checkpointing=True),
    "adapters": replace(SOFT, lora=Lora(rank=2)),
}


def start(step: Train, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build("llama").to(dtype) if step.mode == "dense" else converted(dtype)


def looks(measured: dict[str, Any], name: str = "heldout_lm") -> dict[int, float]:
    """Optimizer step -> what was measured after it."""
    return {entry["step"]: entry[name] for entry in measured["history"] if name in entry}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_a_look_changes_no_weight(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    step = STEPS[name]
    one = start(step, dtype)
    other = copy.deepcopy(one)
    plain = train(one, step, text(40), tmp_path / "one")
    looking = replace(step, evaluate_every=3)
    measured = train(other, looking, text(40), tmp_path / "other", held_out=HELD_OUT)
    assert equal(one, other)
    assert list(looks(measured)) == [3, 6, 9, 10]
    assert not looks(plain)
    for key in set(plain) - {"history"}:
        assert measured[key] == plain[key], key


def test_a_look_draws_no_dropout(tmp_path: Path) -> None:
    one = build("gpt2", dropout=0.3)
    other = copy.deepcopy(one)
    train(one, DENSE, text(40), tmp_path / "one")
    step = replace(DENSE, evaluate_every=1)
    measured = train(other, step, text(40), tmp_path / "other", held_out=HELD_OUT)
    assert equal(one, other)
    other.eval()  # dropout was off in the look after the last step, too
    assert looks(measured)[10] == pytest.approx(language_loss(other, HELD_OUT).item(), abs=1e-5)


@pytest.mark.parametrize("name", ["dense", "soft, shift", "straight", "weighted", "hard"])
def test_it_is_the_model_that_the_step_leaves(name: str, tmp_path: Path) -> None:
    """Of mode soft, hard experts are measured, after the shift of the step."""
    step = replace(STEPS[name], evaluate_every=4)
    model = start(step)
    measured = train(model, step, text(40), tmp_path, held_out=HELD_OUT)
    expected = language_loss(model, HELD_OUT).item()
    assert measured["heldout_lm"] == pytest.approx(expected, abs=1e-5)
    assert measured["heldout_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert looks(measured)[10] == measured["heldout_lm"]
    if name == "soft, shift":
        set_mode(model, "soft")
        assert abs(language_loss(model, HELD_OUT).item() - expected) > 1e-3


def test_modes_gradients_and_flags_are_as_before() -> None:
    model = converted()
    set_mode(model, "soft")
    model.train()
    model.lm_head.eval()  # whatever it was
    language_loss(model, text(2)).backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    flags = [module.training for module in model.modules()]
    drawn = torch.get_rng_state()
    HeldOut([Batch(HELD_OUT[:4]), Batch(HELD_OUT[4:6])]).measure(model, model, 0)
    assert {ffn.mode for ffn in expert_ffns(model)} == {"soft"}
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(param.grad, grads[name]) for name, param in model.named_parameters())


def test_a_resumed_run_has_the_same_curve(tmp_path: Path) -> None:
    step = replace(SOFT, target_sparsity=0.4, evaluate_every=2, checkpoint_every=3)
    through, killed, resumed = converted(), converted(), converted()
    whole = train(through, step, text(40), tmp_path / "through", held_out=HELD_OUT)
    kill_at(killed, 8 + 3 * 13)  # in step 8; a look takes 13 passes
    with pytest.raises(Killed):
        train(killed, step, text(40), tmp_path / "work", held_out=HELD_OUT)
    measured = train(resumed, step, text(40), tmp_path / "work", held_out=HELD_OUT)
    assert equal(resumed, through)
    assert looks(measured) == looks(whole) and list(looks(whole)) == [2, 4, 6, 8, 10]


def classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def labelled(rows: int) -> list[Batch]:
    ids_BT = text(rows)
    return [Batch(ids_BT[i : i + 4], ids_BT[i : i + 4, 0] % 3) for i in range(0, rows, 4)]


def test_of_a_classifier_it_is_loss_and_accuracy(tmp_path: Path) -> None:
    model, step = classifier(), replace(DENSE, evaluate_every=5)
    measured = train(model, step, labelled(40), tmp_path, held_out=labelled(24))
    ids_BT = torch.cat([batch.ids_BT for batch in labelled(24)])
    labels_B = ids_BT[:, 0] % 3
    with torch.no_grad():
        logits_BC = model(input_ids=ids_BT).logits
    loss = torch.nn.functional.cross_entropy(logits_BC, labels_B).item()
    assert measured["heldout_lm"] == pytest.approx(loss, abs=1e-5)
    hits = (logits_BC.argmax(-1) == labels_B).float().mean().item()
    assert measured["heldout_accuracy"] == pytest.approx(hits)
    assert "heldout_perplexity" not in measured


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_shares_of_all_processes_are_the_whole(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All run as many passes: under ZeRO-3 the others would wait for those of one alone."""
    model = build("llama")
    batches = [Batch(ids_BT) for ids_BT in HELD_OUT[:18].split(4)]  # the last has two blocks
    rows: list[Tensor] = []
    monkeypatch.setattr(processes, "count", lambda: count)

    def gather(mine: Tensor) -> Tensor:
        rows.append(mine)
        return torch.cat(rows)

    monkeypatch.setattr(processes, "gather_rows", gather)
    passes = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        held_out = HeldOut(batches)
        passes.append(len(held_out.batches))
        found = held_out.measure(model, model, 0)
    assert passes == [math.ceil(5 / count)] * count
    model.eval()
    expected = language_loss(model, HELD_OUT[:18]).item()
    assert found["heldout_lm"] == pytest.approx(expected, abs=1e-5)


def test_a_model_that_is_spoilt_stops(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[HELD_OUT[0, 0]] = torch.nan
    with pytest.raises(
        FloatingPointError, match="held-out loss is nan nats after optimizer step 7"
    ):
        HeldOut([Batch(HELD_OUT[:1])]).measure(model, model, 7)


def test_every_process_runs_the_same_experts_of_a_host() -> None:
    """ZeRO-3 gathers an expert in all of them, or waits: one without a token runs, too."""
    model = many_experts().eval()
    ran: list[int] = []
    ffns = expert_ffns(model)
    for index, ffn in enumerate(ffns):
        ffn.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        expected = language_loss(model, HELD_OUT[:1]).item()
    assert len(ran) < len(ffns)
    ran.clear()
    found = HeldOut([Batch(HELD_OUT[:1])]).measure(model, model, 0)
    assert ran == list(range(len(ffns)))
    assert found["heldout_lm"] == pytest.approx(expected, abs=1e-5)
    ran.clear()
    with torch.no_grad():
        language_loss(model, HELD_OUT[:1])
    assert len(ran) < len(ffns)


def test_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no held-out text: set evaluate_every to 0"):
        HeldOut([])


@pytest.fixture
def events(tmp_path: Path) -> Iterator[Any]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    yield lambda: accumulator.EventAccumulator(str(tmp_path / "logs"))


def test_tensorboard_shows_it(events: Any, tmp_path: Path) -> None:
    launch = Launch(report_to=("tensorboard",), logs=tmp_path / "logs")
    step = replace(DENSE, evaluate_every=3)
    measured = train(
        build("llama"), step, text(40), tmp_path / "work", launch=launch, held_out=HELD_OUT
    )
    shown = events()
    shown.Reload()
    for name in ("heldout_lm", "heldout_perplexity"):
        (found,) = (t for t in shown.Tags()["scalars"] if t.split("/")[-1] == name)
        values = {one.step: one.value for one in shown.Scalars(found)}
        assert values == pytest.approx(looks(measured, name), rel=1e-5)
    assert any(t.endswith("tokens_per_second") for t in shown.Tags()["scalars"])
