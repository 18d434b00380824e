"""Files that llama.cpp itself runs: greedy text and first log probability equal ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.export import Options, export
from tests.export.hosts import HOSTS, converted, donor_gguf, host
from tests.export.llama_cpp import greedy, perplexity

PROMPT = [504, 3426, 314]
REAL = {"vocab_size": 49152}
"""So many tokens has the vocabulary that llama.cpp is given."""


def ours(model: PreTrainedModel, count: int) -> tuple[list[int], float]:
    """Greedy ids, and the first log probability, in fp32."""
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        first = float(model(ids).logits[0, -1].log_softmax(-1).max())
        made = model.generate(
            ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
    return made[0, len(PROMPT) :].tolist(), first


@pytest.mark.parametrize("family", HOSTS)
def test_a_converted_model_says_the_same(family: str, tmp_path: Path) -> None:
    save(converted(host(family, **REAL)), tmp_path / "in")
    options = Options(type="f32", tokenizer=str(donor_gguf()))
    figures = export(tmp_path / "in", tmp_path / "m.gguf", to="gguf", options=options).figures
    assert figures is not None and figures.sets_equal is not None
    assert figures.sets_equal >= 0.99 and figures.error <= 1e-5
    wanted, first = ours(load(tmp_path / "in"), 16)
    found, logprob = greedy(tmp_path / "m.gguf", PROMPT, 16)
    assert found == wanted
    assert logprob == pytest.approx(first, abs=1e-3)


def test_the_perplexity_is_ours(tmp_path: Path) -> None:
    save(converted(host(**REAL)), tmp_path / "in")
    options = Options(type="f32", tokenizer=str(donor_gguf()))
    export(tmp_path / "in", tmp_path / "m.gguf", to="gguf", options=options, checking=None)
    draw = torch.Generator().manual_seed(0)
    ids_T = torch.randint(3, REAL["vocab_size"], (24,), generator=draw)
    with torch.no_grad():
        logprobs_TV = load(tmp_path / "in")(ids_T[None]).logits[0].log_softmax(-1)
    nats = -logprobs_TV[11:-1].gather(1, ids_T[12:, None]).mean()
    found = perplexity(tmp_path / "m.gguf", [ids_T.tolist()])
    assert found == pytest.approx(float(nats.exp()), rel=1e-3)


@pytest.mark.parametrize("changes", [{"shared_experts": 0}, {"selector": {"kind": "topk", "k": 1}}])
def test_without_shared_experts_and_with_one_expert(changes: Any, tmp_path: Path) -> None:
    save(converted(host(**REAL), **changes), tmp_path / "in")
    options = Options(type="f32", tokenizer=str(donor_gguf()))
    export(tmp_path / "in", tmp_path / "m.gguf", to="gguf", options=options)
    found, logprob = greedy(tmp_path / "m.gguf", PROMPT, 8)
    wanted, first = ours(load(tmp_path / "in"), 8)
    assert found == wanted and logprob == pytest.approx(first, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_dense_model_says_the_same(family: str, tmp_path: Path) -> None:
    save(host(family, **REAL), tmp_path / "in")
    options = Options(type="f32", tokenizer=str(donor_gguf()))
    export(tmp_path / "in", tmp_path / "m.gguf", to="gguf", options=options)
    found, logprob = greedy(tmp_path / "m.gguf", PROMPT, 16)
    wanted, first = ours(load(tmp_path / "in"), 16)
    assert found == wanted and logprob == pytest.approx(first, abs=1e-3)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_every_type_loads_and_runs(kind: Any, tmp_path: Path) -> None:
    save(converted(host(**REAL)), tmp_path / "in")
    options = Options(type=kind, tokenizer=str(donor_gguf()))
    export(tmp_path / "in", tmp_path / "m.gguf", to="gguf", options=options)
    found, logprob = greedy(tmp_path / "m.gguf", PROMPT, 4)
    _, first = ours(load(tmp_path / "in"), 1)
    assert len(found) == 4
    assert logprob == pytest.approx(first, abs={"q8_0": 0.3, "q4_0": 3.0}.get(kind, 0.05))


def test_as_many_experts_as_are_allowed_run(tmp_path: Path) -> None:
    """Above some more, llama.cpp would abort."""
    one = {"kind": "topk", "k": 24}
    model = host(num_hidden_layers=4, intermediate_size=1024, **REAL)
    save(converted(model, selector=one), tmp_path / "in")
    options = Options(type="f16", tokenizer=str(donor_gguf()))
    export(tmp_path / "in", tmp_path / "m.gguf", to="gguf", options=options)
    found, _ = greedy(tmp_path / "m.gguf", PROMPT, 4)
    assert len(found) == 4
