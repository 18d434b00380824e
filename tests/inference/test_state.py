"""Optimised models in PyTorch's own hands: pickle, torch.save, torch.compile, torch.export."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.checkpoint.saving import save
from moe_tools.hosts.ffn import grafted_ffns
from moe_tools.inference.optimized import optimize
from tests.families import logits
from tests.inference.test_optimized import make, make_dense, optimised

ROOT = Path(__file__).parents[2]


def make_optimised(kind: str, **options: Any) -> PreTrainedModel:
    model = make("llama") if kind == "routed" else make_dense("llama", {"kind": "relu"})
    return optimize(model, **options)


def by_pickle(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


every_kind = pytest.mark.parametrize("kind", ["routed", "dense"])


@every_kind
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8, torch.int4], ids=str)
@pytest.mark.parametrize("way", [by_pickle, by_torch])
def test_a_pickled_model_computes_the_same_bit_by_bit(
    kind: str, dtype: torch.dtype | None, way: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    fast = make_optimised(kind, dtype=dtype)
    loaded = way(fast)
    assert torch.equal(logits(loaded), logits(fast))
    ffns = grafted_ffns(loaded)
    assert len(ffns) == 2 and all(ffn.packed is not None for ffn in ffns)


@every_kind
def test_a_pickled_model_saves_what_it_was_made_from(kind: str, tmp_path: Path) -> None:
    fast = make_optimised(kind)
    before = fast.state_dict()
    loaded = by_pickle(fast)
    after = loaded.state_dict()
    assert list(before) == list(after)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype
    save(loaded, tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp is packed for cpu and cannot go to meta"):
        loaded.to("meta")


def test_a_pickled_model_that_lost_digits_is_not_saved(tmp_path: Path) -> None:
    loaded = by_pickle(make_optimised("routed", dtype=torch.int8, linears="int8"))
    with pytest.raises(ValueError, match=r"which lost digits: save the model that it was made"):
        save(loaded, tmp_path / "out")


def test_another_process_can_load_a_pickle(tmp_path: Path) -> None:
    """Which has imported nothing of ours, and has registered no operator."""
    fast = make_optimised("routed")
    ids = torch.randint(3, 64, (1, 7))
    with torch.no_grad():
        torch.save({"model": fast, "ids": ids, "logits": fast(ids).logits}, tmp_path / "all.pt")
    code = """
import sys, torch
found = torch.load(sys.argv[1], weights_only=False)
torch.set_num_threads(1)
assert torch.equal(found["model"](found["ids"]).logits, found["logits"])
assert found["model"].state_dict()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "all.pt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def last_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@every_kind
@pytest.mark.parametrize("dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [1, 12])
def test_a_compiled_model_is_one_graph_and_computes_the_same(
    kind: str, dtype: torch.dtype | None, tokens: int
) -> None:
    fast = make_optimised(kind, dtype=dtype)
    ids = torch.randint(3, 64, (1, tokens))
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert torch.equal(last_logits(compiled, ids), last_logits(fast, ids))


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="torch before 2.13 cannot trace the frozen dataclasses of the reference",
)
@every_kind
def test_so_it_is_on_the_reference(kind: str) -> None:
    fast = make_optimised(kind, backend="reference")
    ids = torch.randint(3, 64, (1, 5))
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for made in (compiled, by_pickle(fast)):
        torch.testing.assert_close(
            last_logits(made, ids), last_logits(fast, ids), rtol=1e-6, atol=1e-6
        )


def test_so_is_one_with_screened_gates_and_quantized_linears() -> None:
    model = make_dense("llama", {"kind": "relu"})
    fast = optimised(model, screen=4.0, linears="int8")
    ids = torch.randint(3, 64, (1, 5))
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert torch.equal(last_logits(compiled, ids), last_logits(fast, ids))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8, torch.int4], ids=str)
def test_an_exported_ffn_can_be_saved_and_run(dtype: torch.dtype | None, tmp_path: Path) -> None:
    ffn = grafted_ffns(make_optimised("dense", dtype=dtype))[0]
    x_TD = torch.randn(3, 16)
    program = torch.export.export(ffn, (x_TD,))
    torch.export.save(program, tmp_path / "ffn.pt2")
    loaded = torch.export.load(tmp_path / "ffn.pt2").module()
    assert torch.equal(loaded(x_TD), ffn(x_TD))
