"""Optimised models on the kernels of a card: which kernels, the same logits and the same texts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

import moe_tools
from moe_tools.checkpoint.saving import save
from moe_tools.hosts.ffn import grafted_ffns
from moe_tools.inference.moe_implementation import lay_out_experts, register_experts
from moe_tools.inference.optimized import optimize
from moe_tools.kernels.packed import PackedFFN
from tests.families import MOE, build, logits
from tests.inference.test_optimized import make, make_dense, padded_batch

triton = pytest.importorskip("triton")

every_kind = pytest.mark.parametrize("kind", ["routed", "dense"])
NEW = 5
"""Tokens of a text."""


def model_of(kind: str, family: str = "llama") -> PreTrainedModel:
    """Routed; or dense, with an activation that gives zeros."""
    return make(family) if kind == "routed" else make_dense(family, {"kind": "relu"})


def packed_of(model: PreTrainedModel) -> list[PackedFFN]:
    return [ffn.packed for ffn in grafted_ffns(model)]  # type: ignore[attr-defined]


def backends_of(model: PreTrainedModel) -> set[str]:
    return {packed.backend for packed in packed_of(model)}


@pytest.mark.gpu
@every_kind
def test_triton_is_what_a_card_takes_by_itself(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    save(model, tmp_path)
    assert backends_of(moe_tools.load(tmp_path, device="cuda", optimize=True)) == {"triton"}
    assert backends_of(moe_tools.optimize(model.to("cuda"))) == {"triton"}


@every_kind
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_logits_stay(kind: str, family: str, place: str) -> None:
    model = model_of(kind, family).to(place)
    fast = optimize(copy.deepcopy(model), backend="triton")
    assert backends_of(fast) == {"triton"}
    torch.testing.assert_close(logits(fast), logits(model), rtol=1e-5, atol=2e-5)


@every_kind
def test_logits_in_bf16_are_off_by_its_rounding(kind: str, place: str) -> None:
    model = model_of(kind).to(place, torch.bfloat16)
    fast = optimize(copy.deepcopy(model), backend="triton")
    assert logits(fast).dtype == torch.bfloat16
    torch.testing.assert_close(logits(fast), logits(model), rtol=0.05, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("tokens", [1, 200])
def test_hosts_of_experts_take_triton_by_themselves(family: str, tokens: int) -> None:
    """Interpreted, `test_moe_implementation` shows the same of a backend that is named."""
    register_experts()
    model = build(family, max_position_embeddings=256).to("cuda")
    ours = copy.deepcopy(model)
    ours.set_experts_implementation("moe_tools")
    lay_out_experts(ours)
    ids = torch.randint(3, 64, (1, tokens)).to("cuda")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def written(model: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
    host: Any = model
    moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
    lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    made = host.generate(**moved, do_sample=False, pad_token_id=0, **lengths, **options)
    return made.tolist()


@every_kind
def test_texts_of_a_padded_batch_stay(kind: str, place: str) -> None:
    model, batch = model_of(kind).to(place), padded_batch()
    fast = optimize(copy.deepcopy(model), backend="triton")
    assert written(fast, batch) == written(model, batch)


def compiling(place: str) -> CompileConfig:
    """As transformers compiles on a card, where it captures graphs too; a break is an error."""
    if place == "cuda":
        return CompileConfig(fullgraph=True)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.slow
@every_kind
def test_a_compiled_generate_writes_what_the_model_wrote(
    kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "cpu":  # a variable of the environment, else, whose reading cannot be traced
        monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    model = model_of(kind).to(place)
    prompt = {"input_ids": torch.randint(3, 64, (1, 7))}
    expected = written(model, prompt)
    fast = optimize(copy.deepcopy(model), backend="triton")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    options = {"cache_implementation": "static", "compile_config": compiling(place)}
    assert written(fast, prompt, **options) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert written(fast, prompt, **options) == expected  # once more, now that it is compiled
