"""Timing whole models: what is compared, and that it is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.bench.generate import bench_generate, folder_models, shape_models, threads
from moe_tools.checkpoint.saving import save
from moe_tools.experts.experts import every_expert_on, expert_ffns
from tests.families import build, logits, randomize, routed


def saved(folder: Path, family: str = "llama") -> PreTrainedModel:
    """A routed model, and its folder."""
    model, _ = routed(build(family))
    randomize(model)
    save(model, folder)
    return model


@torch.no_grad()
def scores(model: PreTrainedModel) -> Tensor:
    return model(torch.arange(3, 12)[None]).logits


def test_a_folder_makes_three_models_of_the_same_weights(tmp_path: Path) -> None:
    model = saved(tmp_path / "out")
    models = folder_models(str(tmp_path / "out"), torch.float32)
    assert list(models) == ["dense", "routed", "optimised"]
    assert expert_ffns(models["dense"]) == []
    assert all(ffn.packed is None for ffn in expert_ffns(models["routed"]))
    assert all(ffn.packed is not None for ffn in expert_ffns(models["optimised"]))
    for name in ("routed", "optimised"):
        torch.testing.assert_close(logits(models[name]), logits(model), atol=2e-5, rtol=1e-5)
    with every_expert_on(model):
        torch.testing.assert_close(logits(models["dense"]), logits(model), atol=2e-5, rtol=1e-5)


def test_a_dense_folder_with_exact_zeros_makes_two(tmp_path: Path) -> None:
    save(build("opt"), tmp_path / "relu")
    models = folder_models(str(tmp_path / "relu"), torch.float32)
    assert list(models) == ["dense", "optimised"]
    dense, fast = bench_generate(models, prompt=5, tokens=3, rounds=1)
    assert dense.sparsity == 0 and 0.2 < fast.sparsity < 0.8


def test_a_shape_makes_models_that_run_a_tenth_of_their_experts() -> None:
    models = shape_models("64x160", 16, torch.float32)
    dense, plain, fast = bench_generate(models, prompt=5, tokens=3, rounds=2)
    assert (dense.model, plain.model, fast.model) == ("dense", "routed", "optimised")
    assert dense.sparsity == 0 and plain.sparsity == fast.sparsity == pytest.approx(0.9)
    assert dense.prefill_speedup == dense.decode_speedup == 1
    assert all(t.prefill > 0 and t.decode > 0 and t.decode_speedup > 0 for t in (plain, fast))
    torch.testing.assert_close(
        scores(models["routed"]), scores(models["optimised"]), atol=2e-5, rtol=1e-5
    )


def test_the_models_share_what_is_not_packed() -> None:
    models = shape_models("64x160", 16, torch.bfloat16)
    places = {m.get_input_embeddings().weight.data_ptr() for m in models.values()}
    assert len(places) == 1


def test_more_tokens_than_the_context_has_are_refused() -> None:
    models = shape_models("64x160", 16, torch.float32)
    with pytest.raises(ValueError, match="2000 tokens and 101 new ones exceed the context of 2048"):
        bench_generate(models, prompt=2000, tokens=100)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "bert", "bert")
    with pytest.raises(ValueError, match="BertForMaskedLM continues no text"):
        folder_models(str(tmp_path / "bert"), torch.float32)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1) as used:
        assert used == before + 1 == torch.get_num_threads()
    assert torch.get_num_threads() == before
    with threads(None) as used:
        assert used == before
