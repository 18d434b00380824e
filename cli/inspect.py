"""`moe-tools inspect`: every router decision, as a table, as JSON and as one page."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_tools.cli.options import (
    BLOCK_LENGTH,
    add_json_option,
    add_model_options,
    new_target,
    positive,
    zero_or_more,
)
from moe_tools.names import SWEEP

if TYPE_CHECKING:
    from moe_tools.inspection import Inspection
    from moe_tools.report.report import Row

SUMMARY = "see which experts run for which token, and which never do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("folder", help="converted model")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="a text to look at, token by token")
    text.add_argument(
        "--data", help="held-out text: docs, a file or folder (FILE:COLUMN), a hub dataset"
    )
    parser.add_argument("--tokens", type=positive, default=32768, help="of --data; default: 32768")
    parser.add_argument("--block-length", type=positive, help=BLOCK_LENGTH)
    parser.add_argument("--batch-size", type=positive, default=4, help="blocks; default: 4")
    parser.add_argument("--ffn", nargs="+", metavar="NAME", help="only these FFNs; default: all")
    parser.add_argument(
        "--top", type=zero_or_more, default=5, help="tokens kept for every expert; default: 5"
    )
    parser.add_argument(
        "--no-norms", action="store_true", help="leave out the captured mass: less work"
    )
    parser.add_argument(
        "--html", type=new_target, metavar="FILE", help="write one page that needs no network"
    )
    parser.add_argument(
        "--sweep", metavar="FILE", help=f"`evaluate --sweep --json`; default: {SWEEP} in the folder"
    )
    add_json_option(parser, "FFNs and experts")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints one row for each FFN; with `--json -` the table goes to standard error."""
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty: give some text to look at")
    from moe_tools.cli.common import quiet_transformers, table_file
    from moe_tools.extras import needed

    if args.html:
        needed("bokeh", "inspect", "--html")
    sweep = _sweep(args)
    with quiet_transformers():
        inspection = _inspect(args)
    _print(inspection, table_file(args.json))
    if args.html:
        from moe_tools.inspection.page import write_page

        text = "a prompt" if args.data is None else args.data
        title = f"{Path(args.folder).resolve().name} on {text}"
        write_page(inspection, args.html, title=title, sweep=sweep)
    if args.json:
        _write_json(inspection, args.json)
    return 0


def _inspect(args: argparse.Namespace) -> Inspection:
    from moe_tools.checkpoint.block_length import chosen_length
    from moe_tools.checkpoint.loading import load, load_tokenizer
    from moe_tools.cli.common import pick_dtype, use_device
    from moe_tools.data import blocks
    from moe_tools.inspection import inspect

    device = use_device(args.device)
    tokenizer = load_tokenizer(args.folder)
    text = args.prompt
    if text is None:
        length, tokens = chosen_length(args.folder, args.block_length), args.tokens
        text = blocks(args.data, tokenizer, split="heldout", length=length, tokens=tokens)
    return inspect(
        load(args.folder, dtype=pick_dtype(args.dtype, device), device=device),
        text,
        tokenizer=tokenizer,
        ffns=args.ffn,
        top=args.top,
        norms=not args.no_norms,
        batch_size=args.batch_size,
    )


def _sweep(args: argparse.Namespace) -> list[Row]:
    from moe_tools.report.report import read_json

    found = Path(args.sweep or Path(args.folder) / SWEEP)
    if not found.is_file():
        if args.sweep:
            raise ValueError(f"--sweep {args.sweep} is no file: write it with evaluate --sweep")
        return []
    return read_json(found)


def _print(inspection: Inspection, file: Any) -> None:
    from rich import box
    from rich.table import Table

    from moe_tools.report.report import console

    made = Table(
        box=box.SIMPLE,
        caption=f"{inspection.tokens:,} tokens, {inspection.sparsity:.1%} of the neurons off",
        caption_justify="left",
    )
    made.add_column("FFN", overflow="fold")
    for heading in (
        "sparsity",
        "experts on",
        "dead",
        "always on",
        "entropy",
        "near tau",
        "captured",
    ):
        made.add_column(heading, justify="right")
    for row in inspection.summaries:
        made.add_row(
            row.ffn,
            f"{row.sparsity:.1%}",
            f"{row.experts_on:.1f} / {row.num_experts}",
            str(row.dead),
            str(row.always_on),
            f"{row.entropy:.3f}",
            f"{row.near:.1%}",
            "-" if math.isnan(row.captured) else f"{row.captured:.1%}",
        )
    console(file).print(made)


def _write_json(inspection: Inspection, target: str) -> None:
    import json

    from moe_tools.cli.common import write_text

    data = {
        "tokens": inspection.tokens,
        "sparsity": inspection.sparsity,
        "ffns": [_finite(vars(row)) for row in inspection.summaries],
        "experts": [_finite(vars(row)) for row in inspection.experts],
    }
    write_text(json.dumps(data, indent=1, allow_nan=False), target)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Replaces NaN, which JSON does not have, by null: it was not measured."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in row.items()
    }
