"""An MoE host through the command line: converted, evaluated, continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.ffn import find_ffns
from tests.families import MOE, build
from tests.tiny import WORDS, Run, build_tokenizer, write_passages

SHORT = ("--data", "text.txt", "--block-length", "16", "--dtype", "fp32")
INSIDE = """
name: inside
steps:
  - swap: {activation: {kind: relu}}
  - split: {expert_size: 8, method: random, tokens: 1024}
  - attach: {start_sparsity: 0.1, tokens: 4096}
  - train: {mode: straight, tokens: 2048, target_sparsity: 0.5, lr: 1e-3}
"""
every_moe = pytest.mark.parametrize("family", MOE)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every MoE family, text.txt and inside.yaml."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work")
    for family in MOE:
        save(build(family), folder / family, build_tokenizer())
    write_passages(folder / "text.txt", 300)
    (folder / "inside.yaml").write_text(INSIDE)
    return folder


def converted(run: Run, family: str, *what: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The folder, its donor's row and its own, measured again from the folder."""
    out = f"{family}-{Path(what[1]).stem}"
    small = ("--tokens", "2048", "--eval-tokens", "512", *SHORT)
    code, table, err = run("convert", *what, "--model", family, "--output", out, *small)
    assert code == 0, err
    assert "MoE layers" in table
    code, rows, err = run("evaluate", out, "--tokens", "512", *SHORT, "--json", "-")
    assert code == 0, err
    donor, row = json.loads(rows)
    return out, donor, row


def continues(run: Run, folder: str) -> None:
    words = ("--prompt", " ".join(WORDS[:4]), "--max-new-tokens", "4", "--dtype", "fp32")
    code, _, err = run("generate", folder, *words)
    assert code == 0 and "4 tokens" in err


@every_moe
@pytest.mark.parametrize("method", ["relu", "prosparse", "turbosparse"])
def test_methods_of_zeros_convert_an_moe_host(
    method: str, family: str, run: Run, work: Path
) -> None:
    out, donor, row = converted(run, family, "--method", method)
    kind = {"relu": "ReLU", "prosparse": "FATReLU", "turbosparse": "DReLU"}[method]
    acts = {type(ffn.act).__name__ for ffn in find_ffns(load(work / out))}
    assert acts <= {kind, f"{kind}Activation", "ReLU"}
    assert donor["two_levels"]["neurons"] == 0 and donor["zeros"] is None
    levels = row["two_levels"]
    assert levels["experts"] == donor["two_levels"]["experts"] > 0.3
    assert 0.3 < levels["neurons"] == pytest.approx(row["zeros"], abs=0.2)
    assert levels["both"] > max(levels["experts"], levels["neurons"])
    assert row["moe_layers"].keys() == donor["moe_layers"].keys()
    continues(run, out)


@every_moe
def test_an_moe_whose_experts_are_moefied(family: str, run: Run, work: Path) -> None:
    out, _, row = converted(run, family, "--recipe", "inside.yaml")
    assert row["ffn_sparsity"] == pytest.approx(0.5, abs=0.1)
    levels = row["two_levels"]
    assert levels["neurons"] > row["ffn_sparsity"] + 0.1  # ReLU's zeros among those that ran
    assert levels["both"] > 0.7
    names = {ffn.name for ffn in expert_ffns(load(work / out))}
    assert any(".experts.3" in name for name in names)
    continues(run, out)
