"""Draws the figures of the page with Bokeh. The page's script colours them and fills in the text.

Letters: T tokens, L FFNs, E experts, R ranks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool, LinearColorMapper, NumeralTickFormatter
from bokeh.models.annotations import Span
from bokeh.plotting import figure

from moe_tools.report.report import Row

OFF, ON, OTHER = "#6f8fbf", "#e08a3c", "#2a9d8f"
"""Blue and orange differ for every kind of colour blindness."""
LINES = (OTHER, ON, OFF, "#b07aa1", "#8c8c8c")
Tooltips = Sequence[tuple[str, str]]


def plain(x: str, y: str, name: str, height: int, **options: Any) -> Any:
    """A figure as wide as its card, without decoration."""
    made = figure(
        x_axis_label=x,
        y_axis_label=y,
        name=name,
        height=height,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_alpha=0,
        min_border_right=18,
        **options,
    )
    made.xgrid.visible = False
    for axis in made.axis:
        axis.axis_label_text_font_style = "normal"
        axis.axis_line_alpha = axis.major_tick_line_alpha = axis.minor_tick_line_alpha = 0
    return made


def picture(
    name: str,
    columns: Mapping[str, np.ndarray],
    axes: tuple[str, str],
    tooltips: Tooltips,
    *,
    height: int,
    span: tuple[float, float],
) -> Any:
    """A map whose cells can be hovered and tapped; the first column is its colour.

    Cell (column i, row j) lies around the point (i, j). The script may add columns of text.
    """
    colour = next(iter(columns))
    rows, width = columns[colour].shape
    source = ColumnDataSource({key: [value] for key, value in columns.items()}, name=f"{name}-data")
    made = plain(*axes, name, height, x_range=(-0.5, width - 0.5), y_range=(-0.5, rows - 0.5))
    made.ygrid.visible = False
    mapper = LinearColorMapper(
        palette=["white", "black"], low=span[0], high=span[1], nan_color="#00000000",
        name=f"{name}-colours",
    )  # fmt: skip
    drawn = made.image(
        colour, x=-0.5, y=-0.5, dw=width, dh=rows, source=source, color_mapper=mapper
    )
    drawn.glyph.name = f"{name}-image"
    picked = ColumnDataSource({"x": [0], "y": [0], "w": [1], "h": [1]}, name=f"{name}-picked")
    made.rect("x", "y", "w", "h", source=picked, fill_alpha=0, line_width=2, name=f"{name}-frame")
    made.add_tools(
        HoverTool(renderers=[drawn], tooltips=list(tooltips), point_policy="follow_mouse")
    )
    made.subscribed_events = {"tap"}
    return made


def token_map(on_LT: np.ndarray, margin_LT: np.ndarray, captured_LT: np.ndarray) -> Any:
    """The map of how many experts run for each token in each FFN."""
    return picture(
        "tokens",
        {"on": on_LT, "margin": margin_LT, "captured": captured_LT},
        ("token", "layer"),
        [
            ("token", "@token"),
            ("layer", "@layer"),
            ("experts on", "@on{0.0 %}"),
            ("nearest margin", "@margin{0.0000}"),
            ("output mass captured", "@captured{0.0 %}"),
        ],
        height=_height(len(on_LT)),
        span=(0, 1),
    )


def expert_map(tokens: int, experts: int) -> Any:
    """The map of one FFN's scores around its threshold; the script fills it, layer by layer."""
    empty = np.zeros((experts, tokens), dtype=np.float32)
    return picture(
        "experts",
        {"side": empty, "margin": empty},
        ("token", "experts, the busiest on top"),
        [
            ("token", "@token"),
            ("layer", "@layer"),
            ("expert", "@expert"),
            ("decision", "@decision"),
            ("score", "@score{0.000}"),
            ("margin to threshold", "@margin{+0.000}"),
        ],
        height=460,
        span=(-1, 1),
    )


def load_map(load_LR: np.ndarray, expert_LR: np.ndarray) -> Any:
    """The map of how many tokens select each expert, the busiest to the left."""
    return picture(
        "loads",
        {"load": load_LR, "expert": expert_LR},
        ("experts of a layer, the busiest first", "layer"),
        [
            ("layer", "@layer"),
            ("expert", "@expert{0}"),
            ("load", "@load{0.00 %} of the tokens"),
        ],
        height=_height(len(load_LR)),
        span=(1e-9, 1 - 1e-9),
    )


def similarity_map(cka_LL: np.ndarray) -> Any:
    """The map of which layers select experts for tokens in the same way."""
    return picture(
        "similarity",
        {"cka": cka_LL},
        ("layer", "layer"),
        [("layers", "@layer and @other"), ("similarity, CKA", "@cka{0.00}")],
        height=420,
        span=(0, 1),
    )


def margin_bars(offset: float | None) -> Any:
    """The histogram of one FFN; `offset` is tau where the threshold is the same for all tokens."""
    label = "score minus threshold" if offset is None else "router score G"
    made = plain(label, "share of decisions", "margins", 300)
    source = ColumnDataSource(
        {"low": [0.0], "high": [1.0], "top": [1.0], "colour": [OFF], "side": [""]},
        name="margins-data",
    )
    bars = made.quad(
        left="low", right="high", bottom=0, top="top", fill_color="colour", line_alpha=0,
        source=source,
    )  # fmt: skip
    made.add_layout(
        Span(location=offset or 0, dimension="height", line_dash="dashed", name="margins-tau")
    )
    made.y_range.start = 0
    made.yaxis.formatter = NumeralTickFormatter(format="0.0 %")
    made.add_tools(
        HoverTool(
            renderers=[bars],
            tooltips=[
                ("from", "@low{0.000}"),
                ("to", "@high{0.000}"),
                ("decisions", "@top{0.00 %}, @side"),
            ],
        )
    )
    return made


def sparsity_bars(sparsity_L: np.ndarray, captured_L: np.ndarray, names: Sequence[str]) -> Any:
    """The chart of neurons off, and of the output mass that the others capture."""
    layer = np.arange(len(names))
    source = ColumnDataSource(
        {"layer": layer, "sparsity": sparsity_L, "captured": captured_L, "name": list(names)},
        name="sparsity-data",
    )
    made = plain("layer", "share", "sparsity", 300, y_range=(0, 1))
    bars = made.vbar(
        "layer", top="sparsity", width=0.78, source=source, color=OTHER, fill_alpha=0.75,
        line_alpha=0, legend_label="neurons off",
    )  # fmt: skip
    if not np.isnan(captured_L).all():
        made.scatter(
            "layer", "captured", size=8, source=source, color=ON, line_alpha=0,
            legend_label="output mass captured",
        )  # fmt: skip
    made.yaxis.formatter = NumeralTickFormatter(format="0 %")
    # One label a row: on a telephone, and in a wide font, both do not fit beside each other.
    made.legend.orientation = "vertical"
    made.legend.location = "top_left"
    made.add_layout(made.legend[0], "above")
    made.add_tools(
        HoverTool(
            renderers=[bars],
            mode="vline",
            tooltips=[
                ("layer", "@layer, @name"),
                ("neurons off", "@sparsity{0.0 %}"),
                ("output mass captured", "@captured{0.0 %}"),
            ],
        )
    )
    made.subscribed_events = {"tap"}
    return made


def pareto(rows: Sequence[Row]) -> Any:
    """The chart of quality over the share of the FFNs' bytes that a token reads; FLOPs beside them.

    Rows of a version that counted no bytes stand over their FLOPs.
    """
    quality = "perplexity" if rows[0].accuracy is None else "accuracy"
    if rows[0].perplexity is None:  # a regression
        quality = "pearson"
    kind = "log" if quality == "perplexity" else "linear"
    counted = all(row.ffn_bytes_share is not None for row in rows)
    title = "FFN bytes a token reads, share of bf16" if counted else "FFN FLOPs, share of dense"
    made = plain(f"{title}, router included", quality, "pareto", 340, y_axis_type=kind)
    made.xaxis.formatter = NumeralTickFormatter(format="0 %")
    series: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        series[f"{row.role}, dense" if row.role != "model" else row.series or row.model].append(row)
    tooltips = [("model", "@model"), (quality, "@quality{0.00}"), ("FFN FLOPs", "@flops{0.0 %}")]
    tooltips += [("FFN bytes", "@share{0.0 %}")] * counted
    for colour, (name, points) in zip(cycle(LINES), series.items(), strict=False):
        ordered = sorted(points, key=lambda row: row.ffn_bytes_share or row.ffn_share)
        source = ColumnDataSource(
            {
                "share": [row.ffn_bytes_share or row.ffn_share for row in ordered],
                "flops": [row.ffn_share for row in ordered],
                "quality": [_measured(row, quality) for row in ordered],
                "model": [_setting(row) for row in ordered],
            }
        )
        made.line("share", "quality", source=source, color=colour, line_width=2)
        marker = "circle" if ordered[0].role == "model" else "diamond"
        dots = made.scatter(
            "share", "quality", source=source, color=colour, size=10, marker=marker,
            legend_label=name,
        )  # fmt: skip
        made.add_tools(HoverTool(renderers=[dots], tooltips=tooltips))
    made.add_layout(made.legend[0], "above")
    made.legend.orientation = "horizontal"
    made.legend.ncols = 3
    return made


def _measured(row: Row, quality: str) -> float | None:
    return row.tasks.get(quality) if quality == "pearson" else getattr(row, quality)


def _setting(row: Row) -> str:
    return row.model + "".join(f", {knob} {value:g}" for knob, value in row.setting.items())


def _height(rows: int) -> int:
    """Height in pixels of a map with a row for each layer."""
    return math.floor(min(640, max(220, 90 + 12 * rows)))
