"""Models side by side: one `Row` each, as a table for people and as JSON for machines. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

Role = Literal["donor", "control", "model"]


@dataclass(frozen=True)
class Row:
    """One model on one text: what JSON holds, and what a line of the table is made of."""

    model: str
    role: Role
    """control: the donor trained on the same tokens without routers."""
    perplexity: float
    nats_per_token: float
    ratio_to_control: float | None
    """Perplexity over the control's; None where there is no control, or no perplexity."""
    ratio_to_donor: float | None
    """Perplexity over the donor's."""
    ffn_sparsity: float
    """Share of neurons off, over tokens and FFNs."""
    ffn_dense_flops: float
    """Per token, every neuron on; like every count here: matrix FLOPs per token of the text."""
    ffn_flops: float
    router_flops: float
    total_flops: float
    total_dense_flops: float
    train_tokens: int | None
    """Tokens it was trained on by its recipe; None when no recipe says so."""
    tokens: int
    """Predicted tokens of this evaluation."""
    seconds: float
    data: str
    block_length: int
    dtype: str
    device: str
    layer_sparsity: dict[str, float] = field(default_factory=dict)
    """FFN name -> share of its neurons off."""
    two_levels: dict[str, float] | None = None
    """Shares of the neurons in MoE layers: in experts that the host did not choose (experts); off,
    or exactly 0, inside the others (neurons); for either reason (both). None: no MoE layer."""
    moe_layers: dict[str, dict[str, float]] = field(default_factory=dict)
    """Path of each MoE layer -> its own `two_levels`."""
    accuracy: float | None = None
    """Share of held-out texts whose class is right; None: a language model."""
    zeros: float | None = None
    """Share of exact zeros among the neurons that ran; None where the activation gives none."""
    recall: float | None = None
    """Among the non-zero neurons, the share that predictors turn on; None: no predictors."""
    precision: float | None = None
    """Among the neurons that predictors turn on, the share that is non-zero."""
    layer_prediction: dict[str, dict[str, float]] = field(default_factory=dict)
    """FFN name -> its recall, precision and predicted sparsity, and the counts behind them."""
    tasks: dict[str, float] = field(default_factory=dict)
    """"task metric" of lm-evaluation-harness -> figure."""
    text: str = ""
    """Fingerprint of the tokens of this evaluation: rows of two do not compare. "": not known."""
    run_text: str = ""
    """Fingerprint of the training text of the run that made the model; "": of none, or unknown."""
    series: str = ""
    """Rows of one series are one line of a plot."""
    setting: dict[str, float] = field(default_factory=dict)
    """Knob of the selectors -> value, where it is not the saved one."""

    @property
    def ffn_share(self) -> float:
        """FLOPs of the FFNs, router included, over those of the dense FFNs."""
        return (self.ffn_flops + self.router_flops) / self.ffn_dense_flops

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, with `ffn_share` beside the fields."""
        return {**asdict(self), "ffn_share": self.ffn_share}


Share = Callable[[Row], float | None]


def _level(name: str) -> Share:
    return lambda row: None if row.two_levels is None else row.two_levels[name]


SHARES: dict[str, Share] = {
    "zeros": lambda row: row.zeros,
    "off in\nchosen\nexperts": _level("neurons"),
    "off in\nMoE layers": _level("both"),
    "recall": lambda row: row.recall,
    "precision": lambda row: row.precision,
}
"""Heading -> a figure with a column of its own where any row has it."""


def check_one_text(rows: Iterable[Row]) -> None:
    """Checks that all rows were measured on the same tokens.

    Raises:
        ValueError: two were not, or of one it is not known.
    """
    first, *others = rows
    for row in others:
        if row.text != first.text:
            raise ValueError(
                f"{first.model} was measured on the text {first.text or '(unknown)'}, {row.model} "
                f"on {row.text or '(unknown)'}: they do not compare, measure both in one call"
            )


def to_json(rows: Sequence[Row]) -> str:
    """Writes a JSON list with one object for each row.

    Raises:
        ValueError: rows of two texts, or a number that JSON does not have (NaN, infinity).
    """
    check_one_text(rows)
    return json.dumps([row.to_dict() for row in rows], indent=1, allow_nan=False)


def read_json(file: Path) -> list[Row]:
    """Reads the rows that `to_json` wrote to a file.

    Raises:
        ValueError: the file holds something else, or rows of two texts.
    """
    known = {entry.name for entry in fields(Row)}
    try:
        objects = json.loads(file.read_text(encoding="utf-8"))
        rows = [Row(**{key: one[key] for key in one if key in known}) for one in objects]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} holds no rows of `evaluate --json`: {error}") from error
    if not rows:
        raise ValueError(f"{file} holds no row: write it with `evaluate --sweep --json`")
    check_one_text(rows)
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Makes a table of the rows; its caption names the texts, the dtype and the device.

    What few models have (`SHARES`, tasks) has a column only where one of them has it.

    Raises:
        ValueError: rows of two texts.
    """
    check_one_text(rows)
    first = rows[0]
    tasks = list(dict.fromkeys(name for row in rows for name in row.tasks))
    shares = {
        heading: share
        for heading, share in SHARES.items()
        if any(share(row) is not None for row in rows)
    }
    made = Table(
        box=box.SIMPLE,
        collapse_padding=True,
        caption_justify="left",
        caption=f"{_text(first)}, {first.dtype} on {first.device}; FFN includes the router; "
        f"x: share of dense{_run_texts(rows)}",
    )
    made.add_column("model", overflow="fold")
    for heading in (
        "perplexity" if first.accuracy is None else "accuracy",
        "/ control",
        "/ donor",
        "FFN\nsparsity",
        *shares,
        "FFN\nMFLOPs/token",
        "total\nMFLOPs/token",
        "trained on\ntokens",
        *(name.replace(" ", "\n") for name in tasks),
    ):
        made.add_column(heading, justify="right")
    for row in rows:
        figures = (_figure(row.tasks.get(name)) for name in tasks)
        made.add_row(*_cells(row, shares.values()), *figures)
    return made


def console(file: IO[str]) -> Console:
    """Makes a console that prints words as they are, brackets too; a pipe gets 120 columns."""
    width = None if file.isatty() else 120
    return Console(file=file, width=width, highlight=False, markup=False)


def print_table(rows: Sequence[Row], file: IO[str]) -> None:
    """Writes the table."""
    console(file).print(table(rows))


def _cells(row: Row, shares: Iterable[Share]) -> list[str]:
    name = f"{Path(row.model).name} (donor)" if row.role == "donor" else row.model
    name += "".join(f", {knob} {value:g}" for knob, value in row.setting.items())
    ffn = (row.ffn_flops + row.router_flops) / 1e6
    return [
        name,
        f"{row.perplexity:.2f}" if row.accuracy is None else f"{row.accuracy:.1%}",
        _ratio(row.ratio_to_control),
        _ratio(row.ratio_to_donor),
        _percent(row.ffn_sparsity) if row.layer_sparsity else "dense",
        *(_percent(share(row)) for share in shares),
        f"{_short(ffn)} ({row.ffn_share:.2f}x)",
        f"{_short(row.total_flops / 1e6)} ({row.total_flops / row.total_dense_flops:.2f}x)",
        "-" if row.train_tokens is None else f"{row.train_tokens:,}",
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _short(mega: float) -> str:
    return f"{mega:.1f}" if mega >= 1 else f"{mega:.3g}"


def print_cells(cells: Sequence[dict[str, Any]], file: IO[str]) -> None:
    """Writes the figures of a grid (`moe_tools.runs.grid.Cell`), a line each."""
    caption = "held-out text {text}; fitted to text {run_text}".format(**cells[0])
    made = Table(box=box.SIMPLE, caption=caption, caption_justify="left")
    for heading in ("split", "router"):
        made.add_column(heading)
    for heading in ("target", "sparsity", "perplexity", "FFN FLOPs", "recall", "captured"):
        made.add_column(heading, justify="right")
    for cell in cells:
        shares = [cell["recall"], cell["captured"]]
        made.add_row(
            cell["split"],
            cell["router"],
            f"{cell['target']:.0%}",
            f"{cell['sparsity']:.1%}",
            f"{cell['perplexity']:.2f}",
            f"{cell['ffn_share']:.2f}x",
            *("-" if share is None else f"{share:.2f}" for share in shares),
        )
    console(file).print(made)


def _text(row: Row) -> str:
    which = f" (text {row.text})" if row.text else ""
    if row.accuracy is None:
        return f"{row.tokens} tokens of held-out {row.data}{which}, blocks of {row.block_length}"
    return f"{row.tokens} held-out texts of {row.data}{which}, cut at {row.block_length} tokens"


def _run_texts(rows: Iterable[Row]) -> str:
    """The training texts behind the models; runs of unequal length have different ones."""
    texts = dict.fromkeys(row.run_text for row in rows if row.run_text)
    return f"; made on training text {', '.join(texts)}" if texts else ""
