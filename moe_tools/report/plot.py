"""Quality over the share of FFN FLOPs that is left: what was paid, and for what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from moe_tools.extras import needed
from moe_tools.report.report import Row, check_one_text


def plot(rows: Sequence[Row], file: str | Path) -> None:
    """Writes a picture, in the format of the file's suffix: a line for every series of points.

    Rows of the same recipe or folder are one series; donors and controls are horizontal lines.
    The better points lie to the left, those of a low perplexity or a high accuracy.

    Raises:
        ValueError: no row to draw, or rows of two texts.
    """
    check_one_text(rows)
    points: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.role == "model":
            points[row.series or row.model].append(row)
    if not points:
        raise ValueError("there is no converted model to draw")
    figure = needed("matplotlib.figure", "plot", "a plot").Figure(
        figsize=(7, 4.5), layout="constrained"
    )
    axes = figure.subplots()
    for name, series in points.items():
        ordered = sorted(series, key=lambda row: row.ffn_share)
        axes.plot(
            [row.ffn_share for row in ordered],
            [_quality(row) for row in ordered],
            marker="o",
            label=_plain(name),
        )
    for row in rows:
        if row.role != "model":
            style = {"donor": "dotted", "control": "dashed"}[row.role]
            axes.axhline(_quality(row), linestyle=style, color="gray", label=f"{row.role}, dense")
    axes.set_xlabel("FFN FLOPs with router, share of dense")
    what = "perplexity" if rows[0].accuracy is None else "accuracy"
    axes.set_ylabel(f"{what}, held-out {_plain(Path(rows[0].data).name)}")
    axes.set_yscale("log" if rows[0].accuracy is None else "linear")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(file)


def _plain(name: str) -> str:
    """A name as it stands there: between two dollars, matplotlib would read TeX."""
    return name.replace("$", r"\$")


def _quality(row: Row) -> float:
    return row.perplexity if row.accuracy is None else row.accuracy
