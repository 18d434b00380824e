"""`moe-tools convert`: a dense model in, a converted one out."""

from __future__ import annotations

import argparse

from moe_tools.cli.options import zero_or_more
from moe_tools.cli.running import add_run_options, run_file
from moe_tools.recipe import recipe_path

SUMMARY = "turn a dense model into one that computes only what a token needs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", help="a published method, e.g. lte (see `moe-tools recipes`)")
    what.add_argument("--recipe", help="a recipe file of your own")
    add_run_options(parser)
    parser.add_argument(
        "--eval-tokens",
        type=zero_or_more,
        default=8192,
        help="0 skips the closing table; a streamed model has none, for it is needed whole",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the recipe; then, of a model that fits in memory, prints the table of `evaluate`."""
    file = args.recipe or recipe_path(args.method)
    return run_file(args, file, eval_tokens=args.eval_tokens)
