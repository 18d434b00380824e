"""Models side by side: one `Row` each, as a table for people and as JSON for machines. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
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
    perplexity: float | None
    """None: a regression, as for `nats_per_token`."""
    nats_per_token: float | None
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
    """"task metric" of lm-evaluation-harness -> figure; what else the model's own task is judged
    by: "mse", "pearson", "spearman", "token accuracy", "exact match"."""
    text: str = ""
    """Fingerprint of the tokens of this evaluation: rows of two do not compare. "": not known."""
    run_text: str = ""
    """Fingerprint of the training text of the run that made the model; "": of none, or unknown."""
    method: str = ""
    """Name of the recipe behind the model; "": unknown."""
    seed: int | None = None
    """Of that run: which training text it read, in which order, and how its parts began."""
    but_seed: str = ""
    """Fingerprint of that recipe, its donor and the dtype, without the seed; "": unknown."""
    series: str = ""
    """Rows of one series are one line of a plot."""
    setting: dict[str, float] = field(default_factory=dict)
    """Knob of the selectors -> value, where it is not the saved one."""
    after: int = 0
    """Only what follows the first `after` tokens of every block was predicted."""
    protocol: str = ""
    """Whose windows the blocks are (`moe_tools.data.protocols`), and how far; "": of none."""
    stride: int | None = None
    """Tokens from the start of a window to that of the next; None: they do not overlap."""
    few_bit_ops: float = 0.0
    """What routers multiply and add in whole numbers of 8 bits and fewer; no FLOPs."""
    ffn_dense_bytes: float | None = None
    """Weights that one token reads of the FFNs in bf16, every neuron on; like every count of bytes
    here as `moe_tools.measure.traffic` counts. None: measured by a version that counted none."""
    ffn_bytes: float | None = None
    """Of the neurons that are on, in bf16 or on the grid that their weights lie on."""
    scoring_bytes: float | None = None
    """Of what routers read to decide."""
    total_bytes: float | None = None
    """Attention and the head included."""
    total_dense_bytes: float | None = None
    together: dict[str, dict[str, float]] = field(default_factory=dict)
    """Sequences that take their next token in one pass (4, 16) -> bytes that the pass reads of
    `ffn_dense`, `ffn`, `scoring`, `total`, `total_dense`: what at least one of them needs."""

    @property
    def ffn_share(self) -> float:
        """FLOPs of the FFNs, router included, over those of the dense FFNs."""
        return (self.ffn_flops + self.router_flops) / self.ffn_dense_flops

    @property
    def ffn_bytes_share(self) -> float | None:
        """Bytes of the FFNs, router included, over those of the dense FFNs in bf16."""
        if self.ffn_bytes is None or self.scoring_bytes is None or self.ffn_dense_bytes is None:
            return None
        return (self.ffn_bytes + self.scoring_bytes) / self.ffn_dense_bytes

    def together_share(self, sequences: int) -> float | None:
        """The same for a pass over the next token of so many sequences."""
        found = self.together.get(str(sequences))
        return None if found is None else (found["ffn"] + found["scoring"]) / found["ffn_dense"]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, with `ffn_share` and `ffn_bytes_share` beside the fields."""
        shares = {"ffn_share": self.ffn_share, "ffn_bytes_share": self.ffn_bytes_share}
        return {**asdict(self), **shares}


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
        if row.after != first.after:
            raise ValueError(
                f"{first.model} was measured after the first {first.after} tokens of a block, "
                f"{row.model} after {row.after}: they do not compare, measure both in one call"
            )
        if (row.protocol, row.stride) != (first.protocol, first.stride):
            raise ValueError(
                f"{first.model} was measured by {_protocol(first)}, {row.model} by "
                f"{_protocol(row)}: they do not compare, measure both in one call"
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

    What few models have (a control, `SHARES`, tasks) has a column only where one of them has it.

    Raises:
        ValueError: rows of two texts.
    """
    check_one_text(rows)
    first = rows[0]
    columns = {
        heading: cell
        for heading, cell in _columns(first).items()
        if heading in ALWAYS or any(cell(row) != "-" for row in rows)
    }
    for task in dict.fromkeys(name for row in rows for name in row.tasks):
        columns[task.replace(" ", "\n")] = partial(_task, task)
    made = Table(
        box=box.SIMPLE,
        collapse_padding=True,
        caption_justify="left",
        caption=f"{_text(first)}, {first.dtype} on {first.device}; FFN includes the router; "
        f"x: share of dense, bytes of bf16{_run_texts(rows)}\n{_BYTES}",
    )
    made.add_column("model", overflow="fold")
    for heading in columns:
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(_name(row), *(cell(row) for cell in columns.values()))
    return made


def console(file: IO[str]) -> Console:
    """Makes a console that prints words as they are, brackets too; a pipe gets 140 columns."""
    width = None if file.isatty() else 140
    return Console(file=file, width=width, highlight=False, markup=False)


def print_table(rows: Sequence[Row], file: IO[str]) -> None:
    """Writes the table."""
    console(file).print(table(rows))


ALWAYS = ("perplexity", "accuracy", "/\ndonor", "FFN\nsparsity")
"""Headings that stand there even if no row has a figure below."""
_BYTES = (
    "MB: weights that a token reads; of 4, 16: that a token each of so many sequences read together"
)


def _columns(first: Row) -> dict[str, Callable[[Row], str]]:
    """Heading -> what a row has below it; "-" is nothing."""
    quality: dict[str, Callable[[Row], str]] = {}
    if not _is_scored(first):
        quality = {"perplexity" if first.accuracy is None else "accuracy": _quality}
    return {
        **quality,
        "/\ncontrol": lambda row: _ratio(row.ratio_to_control),
        "/\ndonor": lambda row: _ratio(row.ratio_to_donor),
        "FFN\nsparsity": _sparsity,
        **{heading: partial(_share, share) for heading, share in SHARES.items()},
        "FFN\nMB/token": _ffn_bytes,
        "total\nMB/token": _total_bytes,
        "FFN (x)\nof 4, 16": _together,
        "FLOPs (x)\nFFN, total": _flops,
        "few-bit\nMops": lambda row: _short(row.few_bit_ops / 1e6) if row.few_bit_ops else "-",
        "trained\ntokens": lambda row: "-" if row.train_tokens is None else f"{row.train_tokens:,}",
    }


def _name(row: Row) -> str:
    name = f"{Path(row.model).name} (donor)" if row.role == "donor" else row.model
    return name + setting_of(row)


def setting_of(row: Row) -> str:
    """What follows a name where the knob of the selectors is not the saved one: ", tau 0.5"."""
    return "".join(f", {knob} {value:g}" for knob, value in row.setting.items())


def quality_of(row: Row) -> float | None:
    """A classifier's accuracy, else the perplexity; None: a regression has neither."""
    return row.perplexity if row.accuracy is None else row.accuracy


def _quality(row: Row) -> str:
    if row.perplexity is None:
        return "-"
    return f"{row.perplexity:.2f}" if row.accuracy is None else f"{row.accuracy:.1%}"


def _is_scored(row: Row) -> bool:
    """Whether a row is of a regression, whose figures have columns of their own."""
    return row.perplexity is None


def _sparsity(row: Row) -> str:
    return _percent(row.ffn_sparsity) if row.layer_sparsity or row.ffn_sparsity else "dense"


def _ffn_bytes(row: Row) -> str:
    share = row.ffn_bytes_share
    if share is None or row.ffn_dense_bytes is None:
        return "-"
    return f"{_short(share * row.ffn_dense_bytes / 1e6)} ({share:.2f}x)"


def _total_bytes(row: Row) -> str:
    if row.total_bytes is None or row.total_dense_bytes is None:
        return "-"
    return f"{_short(row.total_bytes / 1e6)} ({row.total_bytes / row.total_dense_bytes:.2f}x)"


def _together(row: Row) -> str:
    if not row.together:
        return "-"
    shares = (row.together_share(sequences) for sequences in (4, 16))
    return ", ".join("-" if share is None else f"{share:.2f}" for share in shares)


def _flops(row: Row) -> str:
    return f"{row.ffn_share:.2f}, {row.total_flops / row.total_dense_flops:.2f}"


def _share(share: Share, row: Row) -> str:
    return _percent(share(row))


def _task(name: str, row: Row) -> str:
    return _figure(row.tasks.get(name))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _short(mega: float) -> str:
    return f"{mega:.0f}" if mega >= 1000 else f"{mega:.3g}"


def print_cells(cells: Sequence[dict[str, Any]], file: IO[str]) -> None:
    """Writes the figures of a grid (`moe_tools.runs.grid.Cell`), a line each."""
    caption = "held-out text {text}; fitted to text {run_text}".format(**cells[0])
    made = Table(box=box.SIMPLE, caption=caption, caption_justify="left")
    for heading in ("split", "router"):
        made.add_column(heading)
    figures = ("target", "sparsity", "perplexity", "FFN bytes", "FFN FLOPs", "recall", "captured")
    for heading in figures:
        made.add_column(heading, justify="right")
    for cell in cells:
        shares = [cell["recall"], cell["captured"]]
        made.add_row(
            cell["split"],
            cell["router"],
            f"{cell['target']:.0%}",
            f"{cell['sparsity']:.1%}",
            f"{cell['perplexity']:.2f}",
            "-" if cell["ffn_bytes_share"] is None else f"{cell['ffn_bytes_share']:.2f}x",
            f"{cell['ffn_share']:.2f}x",
            *("-" if share is None else f"{share:.2f}" for share in shares),
        )
    console(file).print(made)


def _text(row: Row) -> str:
    which = f" (text {row.text})" if row.text else ""
    if row.accuracy is None and not _is_scored(row):
        after = f", after the first {row.after} of each" if row.after else ""
        if row.protocol:
            text = f"{row.tokens} tokens of {row.protocol} from {row.data}{which}"
            return f"{text}, windows of {row.block_length}{_stride(row)}{after}"
        text = f"{row.tokens} tokens of held-out {row.data}{which}, blocks of {row.block_length}"
        return text + after
    return f"{row.tokens} held-out texts of {row.data}{which}, cut at {row.block_length} tokens"


def _protocol(row: Row) -> str:
    return f"{row.protocol or 'no protocol'}{_stride(row)}"


def _stride(row: Row) -> str:
    return "" if row.stride is None else f" at a stride of {row.stride}"


def _run_texts(rows: Iterable[Row]) -> str:
    """The training texts behind the models; runs of unequal length have different ones."""
    texts = dict.fromkeys(row.run_text for row in rows if row.run_text)
    return f"; made on training text {', '.join(texts)}" if texts else ""
