"""What the donor's FFNs see and do on calibration text.

Letters: B blocks, T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moe_tools.data import Blocks
from moe_tools.data.generate import evaluating
from moe_tools.experts.experts import ExpertFFN, every_expert_on, expert_ffns
from moe_tools.hosts.ffn import FFN, unfused_ffns
from moe_tools.hosts.inputs import run_layers

BATCH = 4
"""Blocks of one forward pass."""
Visit = Callable[[int, Tensor, Tensor], None]
"""(index of the FFN, x_TD, h_TF): input and hidden activations of one batch."""


@torch.no_grad()
def visit_activations(
    model: nn.Module, blocks_BT: Blocks, visit: Visit, *, batch_size: int = BATCH, title: str = ""
) -> None:
    """Runs a model, every expert on, and shows every FFN's input and hidden activations.

    Nothing is kept here: memory is what `visit` keeps. x and h come with their tokens in one
    dimension. An expert of an MoE host sees only the tokens routed to it.

    Raises:
        ValueError: an FFN that saw no token.
    """
    ffns: Sequence[FFN | ExpertFFN] = expert_ffns(model) or unfused_ffns(model)
    unseen = dict(enumerate(ffns))

    def note(index: int, x_TD: Tensor, h_TF: Tensor) -> None:
        unseen.pop(index, None)
        visit(index, x_TD, h_TF)

    with _hooks(ffns, note), evaluating(model), every_expert_on(model):
        for batch in tqdm(blocks_BT.split(batch_size), desc=title, disable=None, leave=None):
            run_layers(model, batch)
    for ffn in unseen.values():
        raise ValueError(f"{ffn.name} saw no calibration token: give more calibration tokens")


def check_routed(model: nn.Module, verb: str) -> list[ExpertFFN]:
    """The routed FFNs.

    Raises:
        ValueError: the model has none.
    """
    ffns = expert_ffns(model)
    if not ffns:
        raise ValueError(f"{verb} needs routers: put `attach` before it in the recipe")
    return ffns


def check_sparsity(ffns: Sequence[ExpertFFN], sparsity: float) -> None:
    """Whether the share `sparsity` of the neurons of every FFN can be off.

    Raises:
        ValueError: shared experts, which always run, leave less.
    """
    for ffn in ffns:
        routed = ffn.importance().routed_neurons / ffn.division.neurons
        if sparsity > routed:
            raise ValueError(
                f"{ffn.name}: {sparsity:.0%} of the neurons cannot be off, {1 - routed:.0%} are in "
                "shared experts"
            )


@contextmanager
def _hooks(ffns: Sequence[FFN | ExpertFFN], visit: Visit) -> Iterator[None]:
    handles = []
    for index, ffn in enumerate(ffns):
        inputs: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...], inputs: list[Tensor] = inputs) -> None:
            inputs[:] = [args[0].flatten(0, -2)]

        def show(
            _: nn.Module,
            args: tuple[Tensor, ...],
            index: int = index,
            inputs: list[Tensor] = inputs,
        ) -> None:
            visit(index, inputs[0], args[0].flatten(0, -2))

        handles.append(ffn.projections.up.register_forward_pre_hook(keep))
        handles.append(ffn.down.register_forward_pre_hook(show))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
