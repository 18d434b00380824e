"""Runs each layer of a model again, as it is converted, on what the dense model gives it.

Letters: B blocks, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Cache

from moe_tools.data import Batch
from moe_tools.data.generate import evaluating
from moe_tools.experts.experts import ExpertFFN, Mode, every_expert_on, expert_ffns
from moe_tools.experts.hooks import hooked
from moe_tools.experts.selectors import Selector
from moe_tools.hosts.inputs import run_layers

Run = Callable[[], Tensor]
"""Runs a layer; returns y_TD."""
Routed = list[tuple[ExpertFFN, Selector, Mode]]
Item = TypeVar("Item")


@torch.no_grad()
def visit_layers(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Tensor | Batch],
    see: Callable[[str, Run], None],
    *,
    title: str = "",
) -> None:
    """Runs a model, every expert on and nothing dropped, and stops after each of some layers.

    Args:
        model: dense or converted.
        layers: paths of modules that get the hidden states first and give them first.
        batches: of blocks_BT, or of rows of a task.
        see: gets the path, and what runs the layer again on what it was given just now: with its
            own routers, and with the thresholds that are on by then.
        title: of the progress bar.
    """
    own: dict[str, Routed] = {
        path: [
            (ffn, ffn.selector, ffn.mode)
            for ffn in expert_ffns(model)
            if ffn.name.startswith(f"{path}.")
        ]
        for path in layers
    }

    def stop(path: str) -> Callable[..., None]:
        def after(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], _: Any) -> None:
            def run() -> Tensor:
                given = [_uncached(value) for value in args]
                with _routing(own[path]):
                    y = layer.forward(*given, **{k: _uncached(v) for k, v in named.items()})
                return y if isinstance(y, Tensor) else y[0]

            see(path, run)

        return after

    handles = (
        model.get_submodule(path).register_forward_hook(stop(path), with_kwargs=True)
        for path in layers
    )
    with hooked(handles), evaluating(model), every_expert_on(model):
        for batch_BT in tqdm(list(batches), desc=title, disable=None, leave=None):
            run_layers(model, batch_BT)


def by_key(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Key -> its items, in their order."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _uncached(value: Any) -> Any:
    """Keys and values of the same tokens are not to be attended to twice."""
    return None if isinstance(value, Cache) else value


@contextmanager
def _routing(ffns: Routed) -> Iterator[None]:
    """While it lasts, these FFNs decide as they are converted."""
    now = [(ffn, ffn.selector, ffn.mode) for ffn, _, _ in ffns]
    try:
        for ffn, selector, mode in ffns:
            ffn.selector, ffn.mode = selector, mode
        yield
    finally:
        for ffn, selector, mode in now:
            ffn.selector, ffn.mode = selector, mode
