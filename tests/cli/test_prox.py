"""`moe-tools convert --method prox`, without training, from folder to folder in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routers.few_bits import FewBitsRouter
from tests.families import TABLE, build, logits
from tests.tiny import Run, build_tokenizer, rows_of, write_passages

SMALL = ("--data", "text.txt", "--block-length", "16", "--eval-tokens", "512", "--dtype", "fp32")
CAUSAL = [name for name in TABLE if name not in ("bert", "roberta", "t5-relu", "t5-gated")]
CAUSAL.remove("qwen2")  # transformers reads every tokenizer beside it as a Qwen2Tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt alone."""
    folder = tmp_path_factory.mktemp("work")
    write_passages(folder / "text.txt", 700)
    return folder


@pytest.mark.parametrize("family", CAUSAL)
def test_half_of_the_neurons_are_off_from_disk(family: str, run: Run, work: Path) -> None:
    torch.manual_seed(0)
    donor = build(family)
    save(donor, work / f"{family}-donor", build_tokenizer())
    out = f"{family}-out"
    words = ("convert", "--method", "prox", "--model", f"{family}-donor", "--output", out, *SMALL)
    code, _, said = run(*words)
    assert code == 0, said
    model = load(str(work / out), dtype=torch.float32)
    assert all(isinstance(ffn.router, FewBitsRouter) for ffn in expert_ffns(model))
    assert (logits(model) - logits(donor)).abs().mean() < 0.5 * logits(donor).abs().mean()
    dense, sparse = rows_of(run, out)
    assert sparse["ffn_sparsity"] == pytest.approx(0.5, abs=0.05)
    assert sparse["perplexity"] < 1.2 * dense["perplexity"]
