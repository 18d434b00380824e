"""`moe-tools compare`: several recipes on one model, one table and one plot."""

from __future__ import annotations

import argparse

from moe_tools.cli.options import (
    add_baseline_options,
    add_donor_options,
    add_json_option,
    add_protocol_options,
    check_protocol_options,
    positive,
)

SUMMARY = "run several recipes with the same tokens and set them side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("recipe", nargs="+", help="a method (see `moe-tools recipes`) or a file")
    parser.add_argument("--model", required=True, help="donor: folder, hub id or GGUF file")
    parser.add_argument("--output", required=True, help="folder of runs; the same command resumes")
    parser.add_argument(
        "--target-sparsity", type=float, nargs="+", default=[0.25, 0.5, 0.75], metavar="S"
    )
    parser.add_argument("--tokens", type=positive, help="of each recipe that trains")
    parser.add_argument(
        "--data", help="docs, a file or folder (FILE:COLUMN), a hub dataset, or self"
    )
    parser.add_argument(
        "--seed",
        type=int,
        nargs="+",
        metavar="N",
        help="one run of each, and a table of their mean and range; default: the recipe's",
    )
    add_baseline_options(parser)
    parser.add_argument(
        "--eval-tokens", type=positive, help="default: 32768; with --protocol, the whole text"
    )
    add_protocol_options(parser, "--eval-data")
    parser.add_argument("--eval-data", metavar="SOURCE", help="a copy of the protocol's text")
    parser.add_argument(
        "--eval-length",
        type=positive,
        metavar="N",
        help="tokens of a window of --protocol; default: 2048, or the context of the model if that "
        "is shorter",
    )
    add_donor_options(parser)
    add_json_option(parser, "the table")


def run(args: argparse.Namespace) -> int:
    """Writes OUTPUT/table.json and OUTPUT/pareto.svg beside the runs, and prints the table."""
    from pathlib import Path

    from moe_tools.cli.common import DTYPES, quiet_transformers, show_rows, use_device, write_text
    from moe_tools.extras import needed
    from moe_tools.report.plot import plot
    from moe_tools.report.report import to_json
    from moe_tools.runs.study import Study, compare_recipes

    check_protocol_options(args, "eval_data", "eval_length")
    needed("matplotlib", "plot", "the plot of a comparison")  # now, and not after the last run
    study = Study(
        recipes=tuple(args.recipe),
        model=args.model,
        output=Path(args.output),
        sparsities=tuple(args.target_sparsity),
        baselines=tuple(args.baselines),
        after=args.after,
        tokens=args.tokens,
        data=args.data,
        seeds=tuple(args.seed or (None,)),
        eval_tokens=args.eval_tokens or (32768 if args.protocol is None else None),
        protocol=args.protocol,
        copy=args.eval_data,
        window=args.eval_length,
        stride=args.stride,
        dtype=DTYPES[args.dtype],
        device=use_device(args.device),
    )
    with quiet_transformers():
        rows = compare_recipes(study)
    write_text(to_json(rows), str(study.output / "table.json"))
    show_rows(rows, args.json)
    plot(rows, study.output / "pareto.svg")
    return 0
