"""Stage b: one FFN at the shapes of models, our kernels beside cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product

import torch

from moe_tools.bench.cuda import BATCHES, Plan, bench_cuda, copy_bandwidth, plan_for, ways
from moe_tools.bench.ways import SPARSITIES
from tools.gpu.context import Context, Row, Skip

SHAPES = ("llama2-7b", "mixtral-8x7b", "smollm2-135m")
TINY = Plan(48, 96, 12, torch.float32, l2=0, batches=(1, 4))


def run(context: Context) -> Iterator[Row]:
    """Yields a row for each way; a dry run says that it ran and that its numbers are finite."""
    if context.dry:
        yield from _dry(context)
        return
    bandwidth = copy_bandwidth()
    yield {"shape": "copy", "gigabytes_per_second": bandwidth / 1e9}
    for tokens, shape in context.within([*product(BATCHES, SHAPES)]):
        try:
            context.need(plan_for(shape, batches=(tokens,)).memory, f"{shape}, {tokens} tokens,")
        except Skip as reason:
            yield {"shape": shape, "tokens": tokens, "skipped": str(reason)}
            continue
        for timing in bench_cuda(shape, batches=(tokens,), bandwidth=bandwidth):
            yield {"shape": shape, **asdict(timing)}
        torch.cuda.empty_cache()


def _dry(context: Context) -> Iterator[Row]:
    made = [way for way in ways(TINY, "cpu") if way.sparsity in (0.0, max(SPARSITIES))]
    for way in context.within(made):
        finite = all(bool(call().isfinite().all()) for call in way.calls)
        row = {"shape": "tiny", "tokens": way.tokens, "sparsity": way.sparsity}
        yield row | {"operation": way.operation, "wrong": "" if finite else "not finite"}


def kernels() -> dict[str, Callable[[], object]]:
    """Calls that compile what `run` runs, by name."""
    return {
        f"speed: {shape}, {tokens} tokens": partial(_call_each, shape, tokens)
        for tokens, shape in product(BATCHES, SHAPES)
    }


def _call_each(shape: str, tokens: int) -> None:
    """Calls each way once, with one layer of weights and at one sparsity."""
    plan = replace(plan_for(shape, batches=(tokens,)), l2=0)
    seen = set()
    for way in ways(plan, "cuda"):
        if way.operation not in seen:
            way.calls[0]()
            seen.add(way.operation)
