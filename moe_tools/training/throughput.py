"""How fast a train step goes: tokens a second, and the share of the device's peak that is of use.

The share is the model FLOPs utilisation (MFU) of PaLM (arXiv 2204.02311, appendix B): the matrix
FLOPs that the forward and the backward pass of the model need, over the time, over the peak of all
devices. What is computed again in the backward pass, a teacher, and the optimizer are of no use in
this sense and not counted. Every neuron counts as on, also where kernels skip some.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from moe_tools import processes
from moe_tools.data import Batch, token_count
from moe_tools.measure.flops import training_flops
from moe_tools.steps.launch import Launch
from moe_tools.training.lora import adapted
from moe_tools.training.parts import trainable_parts

if TYPE_CHECKING:
    from moe_tools.training.train import Train

SAMPLE = 64
"""Batches whose lengths stand for those of all: a text may be longer than anyone reads first."""

# Dense bf16 products with sums in fp32, of the makers' data sheets; FLOPs a second of one device.
# The first name that is found in the device's own counts.
PEAKS: dict[str, float] = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,  # fp16: it has no bf16 products
    "MI325X": 1307.4e12,
    "MI300X": 1307.4e12,
    "MI250X": 191.5e12,  # a card is two devices
    "MI210": 181e12,
}


def known_peak(name: str) -> float | None:
    """Returns the peak of a device by its name, in FLOPs a second; None: not known."""
    for known, peak in PEAKS.items():
        if re.search(rf"(?<![A-Za-z0-9]){known}(?![A-Za-z0-9])", name):
            return peak
    return None


def peak_of(launch: Launch) -> float | None:
    """Returns the peak of one device of a run, as stated or as known; None on a CPU."""
    if launch.peak_flops is not None:
        return launch.peak_flops
    device = torch.device(launch.device)
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def step_flops(model: PreTrainedModel, step: Train, batches: Sequence[Batch]) -> float:
    """FLOPs of training one token, on a model that has no adapters yet; 0: they are not known."""
    try:
        return _step_flops(model, step, batches)
    except (ValueError, AttributeError):  # no FFN or attention as others have them
        return 0.0


def _step_flops(model: PreTrainedModel, step: Train, batches: Sequence[Batch]) -> float:
    first = [batches[at] for at in range(min(len(batches), SAMPLE))]
    length = token_count(first) // sum(map(_texts, first))
    if step.lora is None:
        groups = trainable_parts(model, step)
        return training_flops(model, length, {id(p) for group in groups for p in group["params"]})
    linears = [model.get_submodule(path) for path in adapted(model, step.parts)]
    adapters = step.lora.rank * sum(sum(linear.weight.shape) for linear in linears)  # type: ignore[arg-type,misc]
    return training_flops(model, length, ()) + 3 * 2 * adapters


def _texts(batch: Batch) -> int:
    """How many texts a batch has, none of which sees another."""
    if batch.positions_BT is None:
        return len(batch.ids_BT)
    return int((batch.positions_BT == 0).sum())


class Throughput:
    """Tokens and seconds since the last log, without what checkpoints and evaluations take."""

    def __init__(self, flops: float, peak: float | None) -> None:
        """`flops` are those of training one token (0: not known), `peak` is that of one device."""
        self.flops, self.peak = flops, peak
        self.restart()

    def restart(self) -> None:
        """Begins to count."""
        self.tokens, self.paused, self.began = 0.0, 0.0, time.perf_counter()

    def add(self, tokens: float) -> None:
        """Counts the tokens of an optimizer step, of all processes."""
        self.tokens += tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out the time that passes while it lasts."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Returns `tokens_per_second` and, where both are known, `mfu`; then begins again.

        Without a token since the last call, there is no figure.
        """
        seconds, tokens = time.perf_counter() - self.began - self.paused, self.tokens
        self.restart()
        if not tokens:
            return {}
        found = {"tokens_per_second": tokens / seconds}
        if self.peak is not None and self.flops:
            found["mfu"] = self.flops * tokens / seconds / (self.peak * processes.count())
        return found
