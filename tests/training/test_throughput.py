"""Tokens a second, and the share of a device's peak: by hand, and in the log of a train step."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from moe_tools.measure.flops import attention_flops, forward_flops
from moe_tools.recipe import Lora
from moe_tools.steps.launch import Launch
from moe_tools.training import throughput
from moe_tools.training.batches import whole_batches
from moe_tools.training.progress import in_words
from moe_tools.training.throughput import Throughput, known_peak, peak_of, step_flops
from moe_tools.training.train import train
from tests.families import build
from tests.training.test_train import DENSE, HARD, SOFT, converted, text

LENGTH = 16


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA A1000", None),
    ],
)
def test_a_device_is_known_by_its_name(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_a_cpu_has_no_peak_unless_one_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_of(Launch("cpu")) is None
    assert peak_of(Launch("cpu", peak_flops=2e12)) == 2e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H200 {device}")
    assert peak_of(Launch("cuda:1")) == 989e12
    assert peak_of(Launch("cuda:1", peak_flops=2e12)) == 2e12


# --- FLOPs


def matrices(part: str = "") -> int:
    """Numbers in the weight matrices of a tiny llama, the embedding apart."""
    return sum(
        param.numel()
        for name, param in build("llama").named_parameters()
        if param.ndim == 2 and "embed" not in name and part in name
    )


def test_training_everything_is_three_forward_passes() -> None:
    """A product forward, and two backward: for the weights, and for what enters them."""
    model, batches = build("llama"), whole_batches(text(8), DENSE)
    by_hand = 3 * (2 * matrices() + attention_flops(model, LENGTH))
    assert step_flops(model, DENSE, batches) == pytest.approx(by_hand)
    assert by_hand == pytest.approx(3 * forward_flops(model, LENGTH))


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    model, batches = build("llama"), whole_batches(text(8), DENSE)
    whole = step_flops(model, DENSE, batches)
    ffns = step_flops(model, replace(DENSE, parts="ffn"), batches)
    assert whole - ffns == 2 * (matrices() - matrices(".mlp."))
    lora = step_flops(model, replace(DENSE, lora=Lora(rank=2)), batches)
    adapted = [
        param.shape
        for name, param in model.named_parameters()
        if param.ndim == 2 and ".layers." in name
    ]
    assert len(adapted) == 2 * 7
    adapters = 2 * sum(sum(shape) for shape in adapted)
    assert lora == pytest.approx(whole - 2 * matrices() + 6 * adapters)


def test_recomputed_layers_and_passes_are_of_no_use() -> None:
    model, batches = build("llama"), whole_batches(text(8), DENSE)
    whole = step_flops(model, DENSE, batches)
    for step in (replace(DENSE, checkpointing=True), replace(DENSE, losses={"distill": 1.0})):
        assert step_flops(model, step, batches) == whole


def test_routers_are_charged_where_they_learn() -> None:
    model, batches = converted(), whole_batches(text(8), SOFT)
    soft = step_flops(model, SOFT, batches)
    assert soft == pytest.approx(3 * forward_flops(model, LENGTH))
    assert step_flops(model, replace(HARD, parts="ffn"), batches) < soft


def test_a_model_whose_flops_are_not_known_trains_without_the_share(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    assert step_flops(model, DENSE, whole_batches(text(4), DENSE)) == 0
    launch = Launch(peak_flops=1e9)
    measured = train(model, DENSE, text(40), tmp_path, launch=launch)
    assert "tokens_per_second" in measured["history"][0]
    assert not any("mfu" in entry for entry in measured["history"])


# --- time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows what stands in a list."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_the_figures_are_those_since_the_last_log(clock: list[float]) -> None:
    found = Throughput(flops=10.0, peak=1e3)
    found.restart()
    for seconds, tokens in ((2.0, 400), (4.0, 200)):
        found.add(tokens / 2)
        found.add(tokens / 2)
        clock[0] += seconds
        assert found.take() == pytest.approx(
            {"tokens_per_second": tokens / seconds, "mfu": 10 * tokens / seconds / 1e3}
        )
    assert found.take() == {}


def test_a_pause_is_no_training(clock: list[float]) -> None:
    found = Throughput(flops=10.0, peak=None)
    found.add(100)
    clock[0] += 1
    with pytest.raises(ArithmeticError), found.pause():
        clock[0] += 50
        raise ArithmeticError
    clock[0] += 1
    assert found.take() == {"tokens_per_second": 50.0}


def test_the_peak_is_that_of_all_processes(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput.processes, "count", lambda: 4)
    found = Throughput(flops=10.0, peak=1e3)
    found.add(400)
    clock[0] += 2
    assert found.take() == pytest.approx({"tokens_per_second": 200, "mfu": 0.5})


def test_a_train_step_logs_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    began = time.perf_counter()
    launch = Launch(peak_flops=1e9)
    step = replace(SOFT, batch_size=2, accumulate=2)
    measured = train(converted(), step, text(80), tmp_path, launch=launch)
    seconds = time.perf_counter() - began
    entries = {e["step"]: e for e in measured["history"] if "tokens_per_second" in e}
    assert list(entries) == [10, 20]
    for entry in entries.values():
        assert entry["tokens_per_second"] > 10 * 4 * LENGTH / seconds
        used = step_flops(converted(), step, whole_batches(text(80), step))
        assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * used / 1e9)
    assert "tokens_per_second" not in measured
    assert re.search(r"soft 10/20  lm 4\.\d+ .* tokens_per_second [\d,]+  mfu 0\.\d+", caplog.text)


def test_a_cpu_has_tokens_alone(tmp_path: Path) -> None:
    measured = train(converted(), SOFT, text(40), tmp_path)
    assert "tokens_per_second" in measured["history"][0]
    assert not any("mfu" in entry for entry in measured["history"])


def test_figures_are_readable() -> None:
    figures = {"lm": 4.20777, "tokens_per_second": 123456.7, "heldout_perplexity": 19.914}
    assert in_words(figures) == "lm 4.208  tokens_per_second 123,457  heldout_perplexity 19.91"
    assert in_words({"l1_weight": 1e-6, "loss": 0.0}) == "l1_weight 1e-06  loss 0"
