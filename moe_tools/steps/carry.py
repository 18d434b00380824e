"""Calibration text on its way through a model of which one layer at a time is in memory.

What enters a layer is kept on disk. It goes through the layer as it is before a step changes it, so
a step sees what it would see in the whole model (layer by layer as in GPTQ, arXiv 2210.17323, and
SparseGPT, arXiv 2301.00774, whose next layer sees the changed ones instead).

Letters: B blocks, T tokens of a block, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.atomic import new_file
from moe_tools.checkpoint.parts import OneLayer
from moe_tools.data.generate import evaluating
from moe_tools.experts.experts import every_expert_on
from moe_tools.hosts.inputs import model_inputs
from moe_tools.steps.calibrate import BATCH
from moe_tools.steps.raw_file import append_raw, map_raw


class _Arguments(NamedTuple):
    """What a layer gets besides hidden states: masks and positions, the same for every batch."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class Carried:
    """Hidden states of calibration text: what enters the layer that comes next."""

    def __init__(self, folder: Path, layers: tuple[str, ...], blocks_BT: Tensor) -> None:
        """`folder` is for the hidden states, `layers` are the whole model's."""
        self.folder = folder
        self.layers = layers
        self.blocks_BT = blocks_BT
        self.dtype = torch.float32
        self._arguments: dict[tuple[str, int], _Arguments] = {}

    @torch.no_grad()
    def begin(self, around: PreTrainedModel) -> None:
        """Brings the text to the first layer, through what stands around the layers."""
        body, device = around.base_model, next(around.parameters()).device
        with new_file(self._file(0)) as partial, evaluating(around), self._hooks(around, partial):
            for batch_BT in self.blocks_BT.split(BATCH):
                body(**model_inputs(around, batch_BT.to(device)), use_cache=False)

    @torch.no_grad()
    def enter(self, model: nn.Module, index: int) -> Tensor:
        """Lets a part of one layer see the text, and brings the text to the layer after it.

        Returns:
            The numbers of the blocks (B, 1): what the part takes in place of tokens.
        """
        assert isinstance(model, OneLayer)
        layer = self.layers[index]
        blocks, tokens = self.blocks_BT.shape
        hidden_BTD = map_raw(self._file(index), self.dtype).view(blocks, tokens, -1)
        device = next(model.parameters()).device

        def run(module: nn.Module, numbers_B1: Tensor) -> Tensor:
            x_BTD = hidden_BTD[numbers_B1[:, 0].cpu()].to(device)
            rest = self._arguments[layer, len(x_BTD)]
            y_BTD: Tensor = module(x_BTD, *rest.positional, **rest.named)
            return y_BTD

        model.run_layer = run
        numbers_B1 = torch.arange(blocks)[:, None]
        if index + 1 < len(self.layers):
            self._advance(model, index + 1, numbers_B1)
        return numbers_B1

    def _advance(self, model: nn.Module, index: int, numbers_B1: Tensor) -> None:
        with new_file(self._file(index)) as partial, evaluating(model), every_expert_on(model):
            for batch_B1 in numbers_B1.split(BATCH):
                append_raw(partial, model(batch_B1))

    def leave(self, index: int) -> None:
        """Drops what entered a layer: it is done."""
        self._file(index).unlink(missing_ok=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index}.hidden"

    @contextmanager
    def _hooks(self, around: PreTrainedModel, file: Path) -> Iterator[None]:
        """Keeps what enters the first layer, and what each layer would be called with."""
        handles = []
        for layer in self.layers:

            def see(
                _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], layer: str = layer
            ) -> None:
                hidden_BTD, *others = args
                self._arguments[layer, len(hidden_BTD)] = _Arguments(tuple(others), named)
                if layer == self.layers[0]:
                    self.dtype = hidden_BTD.dtype
                    append_raw(file, hidden_BTD)

            gap = around.get_submodule(layer)
            handles.append(gap.register_forward_pre_hook(see, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
