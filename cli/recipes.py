"""`moe-tools recipes`: the recipes that come with moe-tools."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_tools.recipe import known_recipes, recipe_path

SUMMARY = "list the recipes there are, or print one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("name", nargs="?", help="print this recipe; without it, list all")


def run(args: argparse.Namespace) -> int:
    """Prints the list of recipes, or one of them."""
    if args.name is not None:
        sys.stdout.write(recipe_path(args.name).read_text(encoding="utf-8"))
        return 0
    found = known_recipes()
    width = max(map(len, found), default=0)
    for name, path in found.items():
        print(f"{name:<{width}}  {_first_comment(path)}".rstrip())
    return 0


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
    return ""
