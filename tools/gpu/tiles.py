"""Stage c: the fastest tiles, and up to which share of the neurons the kernels pay.

What is found stands in DIR/tuned.json, a table as `kernels/triton/limits.py` reads it, and in the
user's own, which `optimize` reads (`moe_tools.inference.card_limits`). A run with `--table` times
the tiles of a table beside the pinned ones instead, and writes none.

Letters: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import cast

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from moe_tools.bench.cuda import Layers, Plan, graph_seconds, plan_for
from moe_tools.bench.rounds import median_ratio
from moe_tools.bench.ways import (
    FATRELU,
    SILU,
    Call,
    dense_ffn,
    random_input,
    random_masks,
    with_gates_off,
)
from moe_tools.inference.card_limits import keep
from moe_tools.inference.optimized import PACKED
from moe_tools.kernels.triton import limits
from moe_tools.kernels.triton.config import Config, candidates
from moe_tools.kernels.triton.packed import TritonFFN
from tools.gpu.context import Context, Row
from tools.gpu.speed import SHAPES

TOKENS = (1, 4, 16, 64)
KINDS: tuple[tuple[limits.Dtype, limits.Kind], ...] = (
    ("bf16", "given"),
    ("int8", "given"),
    ("int4", "given"),
    ("bf16", "gate first"),
)
OFF = 0.9
"""Share of the neurons that are off while tiles are compared."""
SHARES = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the union that are held against matrix products."""
REPEATS = 15
NOISE = 1.02
"""How many times faster than the pinned tiling another has to be."""
SAME = 3e-2
"""How far apart the results of two tilings may be, of the largest element."""
TINY = Plan(48, 96, 12, torch.float32, l2=0)


@dataclass(frozen=True)
class Unit:
    """One FFN that is tuned."""

    shape: str
    tokens: int
    dtype: limits.Dtype
    kind: limits.Kind

    @property
    def name(self) -> str:
        """What a page calls it."""
        return f"{self.shape}, {self.tokens} tokens, {self.dtype}, {self.kind}"

    @property
    def tilings(self) -> list[Config | None]:
        """What is tried; None, the pinned one, comes first."""
        return [None, *candidates(self.tokens)[1:]]


UNITS = [Unit(shape, tokens, *kind) for shape, kind, tokens in product(SHAPES, KINDS, TOKENS)]


def run(context: Context) -> Iterator[Row]:
    """Yields a row for each unit; the table is written anew after each."""
    if context.dry:
        yield from _dry(context)
        return
    entries: list[limits.Entry] = []
    for unit in context.within(UNITS):
        plan = plan_for(unit.shape, batches=(unit.tokens,))
        row = {"unit": unit.name}
        try:
            ffns = _Tuned(unit, plan, "cuda")
            if context.table is not None:
                yield row | ffns.gain(_known(unit, plan))
                continue
            found = ffns.tune()
            entries.append(_entry(unit, plan, found))
            (context.out / "tuned.json").write_text(limits.written(entries))
            keep(entries)
            yield row | found
        except torch.OutOfMemoryError:
            yield row | {"skipped": "too little memory"}
        torch.cuda.empty_cache()


def _known(unit: Unit, plan: Plan) -> Config | None:
    """The tiles that the table in force has for a unit."""
    device = torch.cuda.get_device_name()
    known = limits.of(device, unit.dtype, unit.kind, plan.width, plan.neurons)
    return known.config(unit.tokens)


def _entry(unit: Unit, plan: Plan, found: Row) -> limits.Entry:
    return limits.Entry(
        device=torch.cuda.get_device_name(),
        dtype=unit.dtype,
        kind=unit.kind,
        width=plan.width,
        neurons=plan.neurons,
        tokens=unit.tokens,
        share=found["share"],
        tiles=tuple(found["tiles"]),
    )


def _dry(context: Context) -> Iterator[Row]:
    """Two tilings of each kind give the same numbers; nothing is timed, no table is written."""
    kinds: tuple[limits.Dtype, ...] = ("fp32", "int8", "int4")
    units = [Unit("tiny", tokens, kind, "given") for kind, tokens in product(kinds, (1, 4))]
    units.append(Unit("tiny", 4, "fp32", "gate first"))
    for unit in context.within(units):
        ffns, tilings = _Tuned(unit, TINY, "cpu"), unit.tilings[:2]
        yield {"unit": unit.name, "tried": len(tilings), "wrong": ffns.differs(tilings)}


class _Tuned:
    """The layers of one unit, and what takes how long on them.

    All tokens want the same neurons, so that the union is as large as what one of them wants.
    """

    def __init__(self, unit: Unit, plan: Plan, device: str) -> None:
        self.unit, self.plan, self.layers = unit, plan, Layers(plan, device)
        self.dtype = PACKED[unit.dtype]
        self.given = unit.kind == "given"
        self._drawn: dict[float, tuple[Tensor, list[Tensor | None]]] = {}

    @torch.no_grad()
    def calls(self, share: float, config: Config | None) -> list[Call]:
        """One call a layer, with that share of the neurons on."""
        operation = f"experts {self.unit.dtype}" if self.given else "exact gate"
        count = self.plan.layers(1, 1 - share, operation)
        packed = self.layers.packed(count, self.dtype, SILU if self.given else FATRELU)
        if share not in self._drawn:  # once: all tilings compute the same
            self._drawn[share] = self._operands(share, count)
        x_TD, masks = self._drawn[share]
        return [
            partial(_call, cast(TritonFFN, ffn), x_TD, mask_TE, config)
            for ffn, mask_TE in zip(packed, masks, strict=True)
        ]

    def _operands(self, share: float, count: int) -> tuple[Tensor, list[Tensor | None]]:
        tokens, device = self.unit.tokens, self.layers.device
        x_1D = random_input(1, self.plan.width, self.plan.dtype, device)
        if not self.given:
            x_1D = with_gates_off(x_1D, 1 - share)
            return x_1D.repeat(tokens, 1), [None] * count
        masks = random_masks(count, 1, self.plan.experts, 1 - share)
        return x_1D.repeat(tokens, 1), [one.to(device).repeat(tokens, 1) for one in masks]

    def dense(self) -> list[Call]:
        """The same FFN by matrix products."""
        x_TD = random_input(self.unit.tokens, self.plan.width, self.plan.dtype, self.layers.device)
        weights = self.layers.dense(self.plan.layers(self.unit.tokens, 0.0, "F.linear"))
        return [partial(dense_ffn, x_TD, *own) for own in weights]

    @torch.no_grad()
    def differs(self, tilings: list[Config | None]) -> str:
        """Names the tilings that compute something else than the first of them."""
        made = [self.calls(1 - OFF, config)[0]() for config in tilings]
        largest = float(made[0].abs().max())
        errors = [float((y_TD - made[0]).abs().max()) / largest for y_TD in made]
        wrong = [
            str(config) for config, off in zip(tilings, errors, strict=True) if not off <= SAME
        ]
        return f"other numbers with {', '.join(wrong)}" if wrong else ""

    def tune(self) -> Row:
        """Finds the fastest tiling, and then the share up to which it pays."""
        tilings = [one for one in self.unit.tilings if self.fits(one)]
        seconds = graph_seconds([self.calls(1 - OFF, one) for one in tilings], REPEATS)
        gains = [median_ratio(seconds[0], own) for own in seconds]
        best = max(range(len(tilings)), key=lambda index: gains[index])
        if gains[best] < NOISE:
            best = 0
        config = tilings[best]
        return {
            "tried": len(tilings),
            "gain": gains[best],
            "share": self._share(config),
            "tiles": [] if config is None else config.numbers,
            "wrong": self.differs(tilings),
        }

    def fits(self, config: Config | None) -> bool:
        """Whether a program of that tiling has room on the card."""
        try:
            self.calls(1 - OFF, config)[0]()
        except OutOfResources:
            return False
        return True

    def gain(self, config: Config | None) -> Row:
        """How much faster the tiles of a table are than the pinned ones."""
        if config is None:
            return {"tried": 0, "gain": 1.0, "tiles": []}
        pinned, own = graph_seconds([self.calls(1 - OFF, one) for one in (None, config)], REPEATS)
        return {"tried": 1, "gain": median_ratio(pinned, own), "tiles": config.numbers}

    def _share(self, config: Config | None) -> float:
        """The largest share at which, as at all below, the kernels are as fast; 0: at none."""
        # `with_gates_off` scales x, and however it is scaled half of its gates are below zero.
        shares = [share for share in SHARES if self.given or share <= 0.5]
        ways = [self.dense(), *(self.calls(share, config) for share in shares)]
        dense, *sparse = graph_seconds(ways, REPEATS)
        paying = 0.0
        for share, own in zip(shares, sparse, strict=True):
            if median_ratio(dense, own) < 1:
                break
            paying = share
        return paying


def _call(ffn: TritonFFN, x_TD: Tensor, mask_TE: Tensor | None, config: Config | None) -> Tensor:
    return ffn.run(x_TD, mask_TE, config=config)


def kernels() -> dict[str, Callable[[], object]]:
    """Calls that compile what `run` runs, by name."""
    return {
        f"tiles: {unit.name}, {index}": partial(_compile, unit, config)
        for unit in UNITS
        for index, config in enumerate(unit.tilings)
        if config is not None
    }


def _compile(unit: Unit, config: Config) -> None:
    plan = plan_for(unit.shape, batches=(unit.tokens,))
    small = Plan(plan.width, plan.neurons, plan.experts, plan.dtype, 0, plan.batches)
    _Tuned(unit, small, "cuda").fits(config)
