"""Runs that differ in their seed alone: a mean, and how far they lie apart. No torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import IO

from rich import box
from rich.table import Table

from moe_tools.report.report import Row, console, quality_of, setting_of


@dataclass(frozen=True)
class Repeats:
    """Rows of one recipe on one donor at one setting, each of another seed."""

    rows: tuple[Row, ...]

    @property
    def common(self) -> str:
        """What the names of the models have in common; else their method."""
        names = [row.model for row in self.rows]
        least, most = min(names), max(names)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(least, most, strict=False))
        common = "".join(one for one, _ in same).rstrip("-_./")
        return Path(common).name or self.rows[0].method

    @property
    def name(self) -> str:
        """The same, and their setting."""
        return self.common + setting_of(self.rows[0])

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the order of the rows."""
        return [row.seed for row in self.rows if row.seed is not None]

    def spread(self, figure: Callable[[Row], float | None]) -> tuple[float, float, float] | None:
        """The mean of a figure, the least and the most; None where a row has none."""
        found = [figure(row) for row in self.rows]
        values = [value for value in found if value is not None]
        if len(values) < len(found):
            return None
        least, most = min(values), max(values)
        return min(max(fmean(values), least), most), least, most  # a mean of equals may be off


def repeats(rows: Sequence[Row]) -> list[Repeats]:
    """Groups models that differ in their seed alone; one that nobody repeated is in none."""
    groups: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.role == "model" and row.but_seed and row.seed is not None:
            groups[row.but_seed, json.dumps(row.setting, sort_keys=True)].setdefault(row.seed, row)
    return [Repeats(tuple(group.values())) for group in groups.values() if len(group) > 1]


FIGURES: dict[str, tuple[Callable[[Row], float | None], str]] = {
    "/ control": (lambda row: row.ratio_to_control, ".3f"),
    "/ donor": (lambda row: row.ratio_to_donor, ".3f"),
    "FFN sparsity": (lambda row: row.ffn_sparsity, ".1%"),
    "FFN bytes": (lambda row: row.ffn_bytes_share, ".2f"),
    "FFN FLOPs": (lambda row: row.ffn_share, ".2f"),
}
"""Heading -> a figure, and how it is written."""


def print_repeats(rows: Sequence[Row], file: IO[str]) -> None:
    """Writes the mean and the range of every group of repeats; nothing where there is none."""
    groups = repeats(rows)
    if not groups:
        return
    quality = "perplexity" if rows[0].accuracy is None else "accuracy"
    written = ".2f" if quality == "perplexity" else ".1%"
    figures = {quality: (quality_of, written), **FIGURES}
    made = Table(box=box.SIMPLE, caption="mean (least to most) over seeds", caption_justify="left")
    made.add_column("model", overflow="fold")
    made.add_column("seeds", justify="right")
    shown = {
        heading: figure
        for heading, figure in figures.items()
        if any(group.spread(figure[0]) for group in groups)
    }
    for heading in shown:
        made.add_column(heading, justify="right")
    for group in groups:
        cells = (_cell(group.spread(figure), written) for figure, written in shown.values())
        made.add_row(group.name, ", ".join(map(str, group.seeds)), *cells)
    console(file).print(made)


def _cell(spread: tuple[float, float, float] | None, written: str) -> str:
    if spread is None:
        return "-"
    mean, least, most = (f"{value:{written}}" for value in spread)
    return mean if least == most else f"{mean} ({least} to {most})"
