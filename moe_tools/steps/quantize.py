"""Quantize: bring the FFNs' weights onto the grid on which kernels store them.

The weights stay numbers in the dtype of the model, of which a grid point of 8 or 4 bits loses next
to nothing: whoever packs them in so many bits finds the same codes again.

Letters: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.data import Blocks
from moe_tools.experts.conversion import conversion_so_far, write_conversion
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.ffn import FFN, find_ffns, unfused_ffns
from moe_tools.kernels.few_bits import StoredBits, store_rows
from moe_tools.steps.calibrate import visit_activations
from moe_tools.steps.rules import at_least, require
from moe_tools.steps.step import Step, Work


@dataclass(frozen=True)
class Quantize(Step):
    """The FFNs' weights in 8 or 4 bits, a bf16 scale for each 32 numbers of a neuron's row."""

    verb = "quantize"
    changes_function = True

    bits: int = 8
    """8 or 4."""
    tokens: int = 4096
    """Calibration tokens, for 4 bits: the scale of a group is the one whose error matters least to
    the products with the inputs of the text."""

    def check(self) -> None:
        """8 or 4 bits, and at least one token."""
        require(self.bits in (4, 8), self, "bits", self.bits, "8 or 4")
        at_least(1, self, "tokens")

    def needs_text(self) -> bool:
        """Only where scales are searched."""
        return self.bits < 8

    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Rounds the numbers, where there are some, without text: later steps ask for the grid.

        Raises:
            ValueError: as `apply`.
        """
        self._check(model)
        if not any(tensor.is_meta for tensor in model.parameters()):
            quantize(model, cast(StoredBits, self.bits), torch.empty(0, 1, dtype=torch.long))
        self._note(model, donor)

    def apply(self, model: PreTrainedModel, work: Work) -> dict[str, Any]:
        """Changes the weights, in place; returns the error of each FFN's weights, in squares.

        Raises:
            ValueError: routers are there already, the weights are quantised in another format, or
                an FFN of an MoE host saw no token.
        """
        self._check(model)
        errors = quantize(model, cast(StoredBits, self.bits), self.text(work))
        self._note(model, work.donor)
        return {"weight_error": errors}

    def _check(self, model: nn.Module) -> None:
        if expert_ffns(model):
            raise ValueError(
                "quantize changes what routers were made for: put it before `attach` in the recipe"
            )
        for ffn in find_ffns(model):
            ffn.views()

    def _note(self, model: PreTrainedModel, donor: str) -> None:
        write_conversion(model, replace(conversion_so_far(model, donor), weight_bits=self.bits))


@torch.no_grad()
def quantize(model: nn.Module, bits: StoredBits, blocks_BT: Blocks) -> dict[str, float]:
    """Rounds the FFNs' weights in place.

    Args:
        model: dense.
        bits: 8 or 4.
        blocks_BT: calibration text; without any, all inputs of a row count alike.

    Returns:
        Name of an FFN -> ||W - W'||^2 / ||W||^2 over its matrices.
    """
    ffns = unfused_ffns(model)
    moments = [ffn.weights().up_FD.new_zeros(ffn.width, dtype=torch.float32) for ffn in ffns]
    if len(blocks_BT):

        def see(index: int, x_TD: Tensor, _: Tensor) -> None:
            moments[index] += x_TD.float().square().sum(0)

        visit_activations(model, blocks_BT, see, title="calibrate scales")
    return {
        ffn.name: _round(ffn, bits, moment_D if len(blocks_BT) else None)
        for ffn, moment_D in zip(ffns, moments, strict=True)
    }


def _round(ffn: FFN, bits: StoredBits, moment_D: Tensor | None) -> float:
    """Rounds one FFN. A row of W_down meets one number of h: all of its columns count alike."""
    weights = ffn.views()
    lost = whole = 0.0
    for rows_FD in weights.matrices():
        moment = None if rows_FD is weights.down_FD else moment_D
        kept_FD = store_rows(rows_FD, bits, moment).values_FD()
        lost += float((kept_FD - rows_FD.float()).square().sum())
        whole += float(rows_FD.float().square().sum())
        rows_FD.copy_(kept_FD)
    return lost / (whole or 1.0)
