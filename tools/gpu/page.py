"""The page: what all stages found, in Markdown, made of their files alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from tools.gpu.context import Row
from tools.gpu.stages import BY_NAME, Result

DRY = "dry run on a CPU: no figure here is a measurement"
SHOWN = 12
"""Wrong rows of a stage that the page has; its file has all."""


def page(title: str, results: Sequence[Result], dry: bool) -> str:
    """Makes the page.

    Args:
        title: what the card is.
        results: of the stages, in their order.
        dry: whether kernels were interpreted.
    """
    parts = ["# make gpu", title]
    if dry:
        parts.append(f"**{DRY}**")
    for result in results:
        parts += _stage(result, dry)
    return "\n\n".join(parts) + "\n"


def _stage(result: Result, dry: bool) -> list[str]:
    stage = BY_NAME[result.stage]
    taken = "" if dry or not result.seconds else f" ({result.seconds:.0f} s)"
    parts = [f"## {stage.letter}. {stage.title}{taken}"]
    if result.skipped is not None:
        parts.append(f"skipped: {result.skipped}")
    if result.error is not None:
        parts.append(f"failed: {result.error}")
    if result.stopped is not None and result.skipped is None:
        parts.append(result.stopped)
    rows = [row for row in result.rows if not row.get("skipped")]
    if rows:
        parts.append(_TABLES[result.stage](rows))
    parts += _told("skipped", result.rows)
    parts += _told("refused", result.rows)
    parts += _told("wrong", result.rows)
    return [part for part in parts if part]


def _told(what: str, rows: Sequence[Row]) -> list[str]:
    """Lists what was not done, or is wrong, row by row."""
    found = [row for row in rows if row.get(what)]
    lines = [f"- {what}: {_name(row)}: {row[what]}" for row in found[:SHOWN]]
    if len(found) > SHOWN:
        lines.append(f"- and {len(found) - SHOWN} more")
    return ["\n".join(lines)]


def _name(row: Row) -> str:
    keys = ("case", "unit", "host", "model", "way", "step", "tool", "shape", "tokens", "operation")
    return ", ".join(str(row[key]) for key in keys if key in row)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; columns in which no row has anything are left out."""
    kept = [i for i in range(len(heads)) if any(row[i] not in (None, "") for row in rows)]
    lines = [[heads[i] for i in kept], ["---"] * len(kept)]
    lines += [["" if row[i] is None else str(row[i]) for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format(row: Row, key: str, form: str) -> str | None:
    return format(row[key], form) if key in row else None


def _correct(rows: Sequence[Row]) -> str:
    """One line a route: its cases and its largest error, in each dtype."""
    groups: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if "route" in row:
            groups[row["route"]][row["dtype"]].append(row)
    dtypes = sorted({dtype for group in groups.values() for dtype in group})
    lines = [
        [route, *(_largest(group[dtype]) if dtype in group else None for dtype in dtypes)]
        for route, group in groups.items()
    ]
    compiled = sum(row.get("compiled", 0) for row in rows)
    wrong = sum(bool(row.get("wrong")) for row in rows)
    total = sum("route" in row for row in rows)
    said = f"{total} cases, {wrong} wrong; errors are relative to the largest element."
    if compiled:
        said += f" {compiled} calls of the stages behind were compiled."
    return f"{said}\n\n{table(['neurons that run', *dtypes], lines)}"


def _largest(rows: Sequence[Row]) -> str:
    return f"{len(rows)} cases, {max(row['error'] for row in rows):.0e}"


def _speed(rows: Sequence[Row]) -> str:
    """One line for each shape, number of tokens and operation; a cell for each sparsity."""
    copies = [row["gigabytes_per_second"] for row in rows if row["shape"] == "copy"]
    groups: dict[tuple[Any, ...], dict[float, Row]] = defaultdict(dict)
    dense = {}
    for row in rows:
        if row["shape"] != "copy" and row["sparsity"]:
            key = (row["shape"], row["tokens"], row["operation"])
            groups[key][row["sparsity"]] = row
        elif row["shape"] != "copy":
            dense[row["shape"], row["tokens"]] = _format(row, "ms", ".4f")
    shares = sorted({share for group in groups.values() for share in group})
    lines = [
        [*key[:2], dense.get(key[:2]), key[2], *(_speed_cell(group.get(share)) for share in shares)]
        for key, group in groups.items()
    ]
    heads = [
        "shape",
        "tokens",
        "cuBLAS, ms",
        "operation",
        *(f"{share:.0%} off" for share in shares),
    ]
    said = (
        f"A copy moves {copies[0]:.0f} GB/s. Cells: times cuBLAS, ms, GB/s of weights and their "
        "share of the copy.\n\n"
        if copies
        else ""
    )
    return said + table(heads, lines)


def _speed_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "ms" not in row:
        return "ran"
    rate = f"{row['gigabytes_per_second']:.0f} GB/s, {row['share_of_bandwidth']:.0%}"
    return f"{row['speedup']:.2f}x, {row['ms']:.4f}, {rate}"


def _tiles(rows: Sequence[Row]) -> str:
    heads = ["FFN", "tilings", "times the pinned", "pays up to", "tiles"]
    lines = [
        [
            row["unit"],
            row.get("tried"),
            _format(row, "gain", ".2f"),
            _format(row, "share", ".0%"),
            ("pinned" if not row["tiles"] else " ".join(map(str, row["tiles"])))
            if "tiles" in row
            else None,
        ]
        for row in rows
    ]
    return table(heads, lines)


def _generate(rows: Sequence[Row]) -> str:
    prefills = sorted({key for row in rows for key in row if key.startswith("prefill")})
    heads = ["host", "layers", "model", "way", *prefills, "decode"]
    lines = [
        [
            *(row.get(key) for key in heads[:4]),
            *(_format(row, key, ".0f") for key in prefills),
            _format(row, "decode", ".1f") or ("refused" if row.get("refused") else None),
        ]
        for row in rows
    ]
    said = "Tokens a second.\n\n" if any("decode" in row for row in rows) else ""
    return said + table(heads, lines)


def _training(rows: Sequence[Row]) -> str:
    heads = ["step", "layers", "tokens", "ms", "GiB beside the weights"]
    lines = [
        [
            *(row.get(key) for key in heads[:3]),
            _format(row, "ms", ".2f"),
            f"{row['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in row else None,
        ]
        for row in rows
    ]
    return table(heads, lines)


def _sanitize(rows: Sequence[Row]) -> str:
    return table(["tool", "said"], [[row["tool"], row.get("summary")] for row in rows])


_TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "correct": _correct,
    "speed": _speed,
    "tiles": _tiles,
    "generate": _generate,
    "training": _training,
    "sanitize": _sanitize,
}
