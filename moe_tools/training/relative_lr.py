"""Learning rates as a share of the weights: a step that one model does not feel wrecks another.

An optimizer of the kind of Adam moves every number by about its learning rate, however large the
number is. Root mean squares of FFN weights are 0.2 in SmolLM2-135M and 0.04 in Gemma-3-270M, whose
norms scale what comes of them. Adafactor takes steps relative to each tensor (arXiv 1804.04235,
section 8); here one number stands for the model, so that its weights keep one rate.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn

from moe_tools.training import zero
from moe_tools.training.parts import ffn_parameters

if TYPE_CHECKING:
    from moe_tools.training.train import Train


def settled(model: nn.Module, step: Train) -> Train:
    """The step with its `lr` in numbers, where `relative_lr` says it; in all processes at once."""
    if not step.relative_lr:
        return step
    return replace(step, lr=step.relative_lr * weight_size(model))


@torch.no_grad()
def weight_size(model: nn.Module) -> float:
    """The median over the FFNs' matrices of their root mean square.

    Raises:
        ValueError: all of them are 0.
    """
    whole = (zero.whole(param) for param in ffn_parameters(model))
    sizes = [float(each.float().square().mean().sqrt()) for each in whole if each.dim() > 1]
    if not any(sizes):
        raise ValueError("relative_lr is a share of the FFNs' weights, and they are 0: give `lr`")
    return median(sizes)
