"""Learning rates as a share of the weights: a step that one model does not feel wrecks another.

An optimizer of the kind of Adam moves every number by about its learning rate, however large the
number is. The weights of SmolLM2-135M have a root mean square of 0.19, those of Gemma-3-270M, whose
norms scale what comes of them, of 0.04. Adafactor takes steps relative to each tensor (arXiv
1804.04235, section 8); here one number stands for the model, so that its weights keep one rate.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from moe_tools.training import zero
from moe_tools.training.parts import layer_parameters

if TYPE_CHECKING:
    from moe_tools.training.train import Train


def in_numbers(model: PreTrainedModel, step: Train) -> Train:
    """The step with its `lr` in numbers, whatever its unit; in all processes at once."""
    if step.lr_unit == "absolute":
        return step
    return replace(step, lr=step.lr * weight_size(model), lr_unit="absolute")


@torch.no_grad()
def weight_size(model: PreTrainedModel) -> float:
    """The median over the matrices of the layers of their root mean square.

    Embeddings of tokens, the head and routers have no say.

    Raises:
        ValueError: all of them are 0.
    """
    numbers = (zero.joined(param) for param in layer_parameters(model))
    sizes = [float(each.float().square().mean().sqrt()) for each in numbers if each.dim() > 1]
    if not any(sizes):
        raise ValueError("lr_unit weights needs weights other than 0: use absolute")
    return median(sizes)
