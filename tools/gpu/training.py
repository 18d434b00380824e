"""Stage e: a training step of two layers of a llama, dense and routed, and its memory.

Letters: B rows of a batch (one), T tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from moe_tools.bench.cuda import between_events
from moe_tools.experts.conversion import set_mode
from moe_tools.experts.experts import Mode, expert_ffns
from tools.gpu.context import Context, Row
from tools.gpu.generate import FULL, TINY, route, sizes_of

LAYERS, TOKENS, ROUNDS = 2, 2048, 5
MODES: tuple[Mode | None, ...] = (None, "soft", "straight", "hard")
"""None, the dense step, comes first: routers stay."""


def run(context: Context) -> Iterator[Row]:
    """Yields a row for the dense step and for each mode; all have the same weights."""
    sizes = TINY if context.dry else FULL
    layers, tokens = (1, 5) if context.dry else (LAYERS, TOKENS)
    config = LlamaConfig(**sizes_of(sizes, layers), intermediate_size=sizes.neurons)
    each = 4 * sizes.width**2 + 3 * sizes.width * sizes.neurons
    values = 40 * tokens * (sizes.neurons + 4 * sizes.width)
    context.need(layers * (2.5 * each * sizes.dtype.itemsize + values), "a training step")
    torch.manual_seed(0)
    with torch.device(context.device):
        model: Any = LlamaModel._from_config(config, dtype=sizes.dtype)
    ids_BT = torch.randint(sizes.vocabulary, (1, tokens), device=context.device)
    of = {"layers": layers, "tokens": tokens}
    for mode in context.within(MODES):
        if mode is not None:
            if not expert_ffns(model):
                route(model, sizes)
            set_mode(model, mode)
        model.train()
        yield {"step": mode or "dense"} | of | _measure(context, model, ids_BT)


def _measure(context: Context, model: Any, ids_BT: Tensor) -> Row:
    """Times forward and backward; a dry run says whether all gradients are numbers."""

    def call() -> None:
        model(ids_BT, use_cache=False).last_hidden_state.float().square().mean().backward()

    if context.dry:
        model.zero_grad(set_to_none=True)
        call()
        grads = [one.grad for one in model.parameters() if one.grad is not None]
        finite = bool(grads) and all(bool(grad.isfinite().all()) for grad in grads)
        return {"wrong": "" if finite else "no finite gradients"}
    milliseconds, peaks = zip(*(_round(model, call) for _ in range(1 + ROUNDS)), strict=True)
    return {"ms": statistics.median(milliseconds[1:]), "peak_bytes": max(peaks[1:])}


def _round(model: Any, call: Callable[[], None]) -> tuple[float, int]:
    """One step, in ms, and the bytes that it takes beside the weights at its peak."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start, stop = between_events(call)
    torch.cuda.synchronize()
    return start.elapsed_time(stop), torch.cuda.max_memory_allocated() - before
