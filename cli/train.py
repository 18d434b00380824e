"""`moe-tools train`: what convert does, in one process or in many, without the closing table."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_tools.cli.running import add_run_options, run_file
from moe_tools.recipe import recipe_path

SUMMARY = "run a recipe on one device or many: plainly, by torchrun or by deepspeed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("recipe", help="a recipe file, or the name of one that comes with us")
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the recipe; `moe-tools evaluate` makes the table."""
    return run_file(args, args.recipe if Path(args.recipe).suffix else recipe_path(args.recipe))
