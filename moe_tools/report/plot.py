"""Quality over the share of the FFNs' bytes and FLOPs that is left: what was paid, for what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_tools.extras import needed
from moe_tools.report.repeats import repeats
from moe_tools.report.report import Row, check_one_text


def plot(rows: Sequence[Row], file: str | Path) -> None:
    """Writes a picture, in the format of the file's suffix: a line for every series of points.

    Two panels have one quality over two prices: the bytes that a token reads of the FFNs, over
    those in bf16, and their FLOPs. Rows of the same recipe or folder are one series, and rows that
    differ in their seed alone one point, their mean, with a bar from the least to the most; donors
    and controls are points, and lines to compare with. The better points lie below and to the
    left, those of an accuracy above. Perplexities are divided by the donor's, where all have one,
    and shown up to `MOST` times it.

    Raises:
        ValueError: no row to draw, or rows of two texts.
    """
    check_one_text(rows)
    if all(row.role != "model" for row in rows):
        raise ValueError("there is no converted model to draw")
    panels = [panel for panel in PANELS if all(panel.share(row) is not None for row in rows)]
    figure = needed("matplotlib.figure", "plot", "a plot").Figure(
        figsize=(2 + 4.5 * len(panels), 4.8), layout="constrained"
    )
    quality = _quality(rows)
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(every, panels, strict=True):
        _draw(axes, rows, panel, quality)
    if quality.is_ratio:
        _mark_ratios(every[0], rows, quality)
    text = rows[0].protocol or f"held-out {Path(rows[0].data).name}"
    every[0].set_ylabel(f"{quality.name}, {_plain(text)}")
    every[0].legend()
    figure.savefig(file)


def _mark_ratios(axes: Any, rows: Sequence[Row], quality: Quality) -> None:
    """Writes ratios as 1.2x, and ends where `MOST` says."""
    limits = axes.get_ylim()
    if quality.most is not None:
        limits = 0.97 * min(filter(None, map(quality.of, rows))), quality.most
    axes.set_yticks(TICKS, [f"{ratio:g}x" for ratio in TICKS])
    axes.minorticks_off()
    axes.set_ylim(limits)  # ticks would widen them


MOST = 3.0
"""Perplexities above so many times the dense one leave the picture at the top."""
TICKS = (0.9, 1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0, 10.0)


class Panel(NamedTuple):
    """What a quality is drawn over."""

    title: str
    share: Callable[[Row], float | None]


PANELS = (
    Panel("FFN bytes a token reads, router included, share of bf16", lambda r: r.ffn_bytes_share),
    Panel("FFN FLOPs with router, share of dense", lambda r: r.ffn_share),
)


class Quality(NamedTuple):
    """What is drawn upwards."""

    name: str
    scale: str
    of: Callable[[Row], float | None]
    is_ratio: bool = False
    """Over the donor's."""
    most: float | None = None
    """Where the picture ends; None: behind the last point."""


def _quality(rows: Sequence[Row]) -> Quality:
    if rows[0].accuracy is not None:
        return Quality("accuracy", "linear", lambda row: row.accuracy)
    if rows[0].perplexity is None:
        return Quality("Pearson correlation", "linear", lambda row: row.tasks.get("pearson"))
    if all(row.ratio_to_donor or row.role == "donor" for row in rows):
        ratios = [row.ratio_to_donor or 1.0 for row in rows]
        # What is so much worse is of no use, and would press all others into one line.
        most = MOST if max(ratios) > MOST > min(ratios) else None
        return Quality(
            "perplexity / dense", "log", lambda row: row.ratio_to_donor or 1.0, True, most
        )
    return Quality("perplexity", "log", lambda row: row.perplexity)


class Point(NamedTuple):
    """One model, or several that differ in their seed alone."""

    share: float
    value: float
    below: float = 0.0
    """From the least of several to their mean."""
    above: float = 0.0


def _draw(axes: Any, rows: Sequence[Row], panel: Panel, quality: Quality) -> None:
    for role in ("donor", "control"):
        dense = [row for row in rows if row.role == role]
        if dense:
            _draw_dense(axes, dense, panel, quality)
    for name, points in _series(rows, panel, quality).items():
        shares, values, below, above = zip(*sorted(points), strict=True)
        bars = (below, above) if any(above) else None
        axes.errorbar(shares, values, bars, marker="o", capsize=3, label=_plain(name))
    axes.set_xlabel(panel.title)
    axes.set_yscale(quality.scale)
    axes.grid(visible=True, which="both", alpha=0.3)


def _draw_dense(axes: Any, rows: Sequence[Row], panel: Panel, quality: Quality) -> None:
    """Points, and a line across the picture from each."""
    line, marker = {"donor": ("dotted", "D"), "control": ("dashed", "s")}[rows[0].role]
    style = {"linestyle": line, "color": "gray"}
    ordered = sorted(rows, key=lambda row: panel.share(row) or 0.0)
    shares, values = map(panel.share, ordered), list(map(quality.of, ordered))
    axes.plot(list(shares), values, marker=marker, label=f"{rows[0].role}, dense", **style)
    for value in values:
        axes.axhline(value, **style)


def _series(rows: Sequence[Row], panel: Panel, quality: Quality) -> dict[str, list[Point]]:
    """Name of each line of converted models -> its points; what has no quality has none."""
    found: dict[str, list[Point]] = defaultdict(list)
    groups = repeats(rows)
    for group in groups:
        share, value = group.spread(panel.share), group.spread(quality.of)
        if share is not None and value is not None:
            mean, least, most = value
            point = Point(share[0], mean, mean - least, most - mean)
            found[group.rows[0].series or group.common].append(point)
    grouped = {id(row) for group in groups for row in group.rows}
    for row in rows:
        share_of_one, value_of_one = panel.share(row), quality.of(row)
        if row.role != "model" or id(row) in grouped:
            continue
        if share_of_one is not None and value_of_one is not None:
            found[row.series or row.model].append(Point(share_of_one, value_of_one))
    return found


def _plain(name: str) -> str:
    """A name as it stands there: between two dollars, matplotlib would read TeX."""
    return name.replace("$", r"\$")
