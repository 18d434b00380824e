"""The loss on held-out text in the course of a train step, which it does not disturb.

Letters: B blocks of a batch, T tokens, V vocabulary or classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_tools import processes
from moe_tools.data import Batch
from moe_tools.data.generate import evaluating
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.inputs import model_inputs
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.names import IGNORE
from moe_tools.training.compiled import eager

NAME = "heldout"
"""How the names of its figures begin."""
ROWS = 128
"""Rows whose logits are in fp32 at once."""


class HeldOut:
    """Measures a model that is being trained, as it would be if the step ended now.

    Dropout is off, and a model in mode soft or straight is measured in mode hard, as the step
    leaves it. Every process takes its share of the batches, and all run as many passes.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        """Takes the batches of all processes.

        Raises:
            ValueError: there are none.
        """
        if not batches:
            raise ValueError("there is no held-out text: set evaluate_every to 0, or give more")
        mine = [batches[at] for at in range(processes.rank(), len(batches), processes.count())]
        idle = -(-len(batches) // processes.count()) - len(mine)
        self.batches = [(batch, True) for batch in mine] + [(batches[0], False)] * idle
        """Each with whether it counts: what does not is run beside the other processes."""

    @torch.no_grad()
    def measure(
        self, model: nn.Module, host: nn.Module, step: int, device: torch.device | None = None
    ) -> dict[str, float]:
        """Returns `heldout_lm` in nats, with `heldout_perplexity` or `heldout_accuracy`.

        Of a regression it is the mean squared error, alone.

        Args:
            model: what is called: the host itself, or what shards it.
            host: the model that is trained.
            step: optimizer steps so far, for the error.
            device: where it computes; None: where its weights are.

        Raises:
            FloatingPointError: the loss is not finite, or beyond any text.
        """
        device = device or next(host.parameters()).device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        with _as_it_ends(host, device):
            for batch, counts in self.batches:
                batch = batch.to(device)
                logits = model(**model_inputs(host, batch)).logits.flatten(0, -2)
                labels = batch.labels_B
                if labels is None:
                    labels = batch.next_labels_BT().flatten()
                sums += _sums(logits, labels) * counts
        nats, hits, predicted = processes.gather_rows(sums.cpu()[None]).sum(0).tolist()
        mean = nats / predicted
        if not mean < 700:  # NaN too; exp(710) is no float any more
            raise FloatingPointError(
                f"the held-out loss is {mean} nats after optimizer step {step}: lower the learning "
                "rates; the last good checkpoint is kept"
            )
        found = {f"{NAME}_lm": mean}
        labels_B = self.batches[0][0].labels_B
        if labels_B is not None and labels_B.is_floating_point():
            return found
        if labels_B is None:
            return found | {f"{NAME}_perplexity": math.exp(mean)}
        return found | {f"{NAME}_accuracy": hits / predicted}


def _sums(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """The nats, or squared errors of scores, the hits and the number of what is labelled."""
    sums = torch.zeros(3, dtype=torch.float64, device=logits_TV.device)
    if labels_T.is_floating_point():
        sums[0] = (logits_TV.float().squeeze(-1) - labels_T).square().sum()
        sums[2] = len(labels_T)
        return sums
    for rows_TV, rows_T in zip(logits_TV.split(ROWS), labels_T.split(ROWS), strict=True):
        rows_TV = rows_TV.float()
        kept = rows_T != IGNORE
        sums[0] += nn.functional.cross_entropy(rows_TV, rows_T, reduction="sum")
        sums[1] += ((rows_TV.argmax(-1) == rows_T) & kept).sum()
        sums[2] += kept.sum()
    return sums


@contextmanager
def _as_it_ends(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model as after the step; afterwards, it and what is drawn are as before."""
    modes = [(ffn, ffn.mode) for ffn in expert_ffns(model)]
    hosts = [module for module in model.modules() if isinstance(module, HostExperts)]
    drawn = [device] if device.type == "cuda" else []
    try:
        for ffn, mode in modes:
            ffn.mode = "hard" if mode in ("soft", "straight") else mode
        for host in hosts:
            host.runs_idle = True
        with torch.random.fork_rng(devices=drawn), evaluating(model), eager():
            yield
    finally:
        for ffn, mode in modes:
            ffn.mode = mode
        for host in hosts:
            host.runs_idle = False
