"""What `--dry-run` shows: a recipe on a model, without weights and before any work."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from moe_tools.cli.options import positive

if TYPE_CHECKING:
    from rich.table import Table

    from moe_tools.recipe import Recipe
    from moe_tools.runs.plan import Plan, Source


def add_dry_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds --dry-run and --processes."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what would be done and what it takes; needs a config.json, no weights",
    )
    parser.add_argument(
        "--processes", type=positive, default=1, help="that would train together; default: 1"
    )


def dry_run(recipe: Recipe, args: argparse.Namespace) -> int:
    """Prints the plan; `args` has model, dtype, processes and json."""
    from moe_tools.cli.common import DTYPES, write_text
    from moe_tools.runs.plan import plan

    found = plan(recipe, args.model, dtype=DTYPES[args.dtype], processes=args.processes)
    if args.json:
        write_text(json.dumps(found.to_dict(), indent=1), args.json)
    if args.json != "-":
        _print(found)
    return 0


def _print(found: Plan) -> None:
    from moe_tools.report.report import console

    screen = console(sys.stdout)
    paper = f" ({found.paper})" if found.paper else ""
    screen.print(f"recipe  {found.recipe}{paper}")
    screen.print(f"model   {found.model}: {found.host}, {found.parameters:,} parameters")
    for source in found.data:
        screen.print(f"data    {_source(source)}")
    screen.print(_steps(found))
    screen.print(_memory(found))
    screen.print("memory as of arXiv 1910.02054; activations come on top")


def _source(source: Source) -> str:
    kinds = {
        "docs": "documentation inside pinned wheels",
        "self": "the donor's own samples",
        "hub": "a hub dataset, not asked for now",
        "file": "a file or folder" + ("" if source.there else " that is not there"),
    }
    return f"{source.name}: {kinds[source.kind]}; {source.tokens:,} tokens are read"


def _steps(found: Plan) -> Table:
    from rich import box
    from rich.table import Table

    many = f"\n{found.processes} processes" if found.processes > 1 else ""
    made = Table(box=box.SIMPLE, caption_justify="left")
    made.add_column("step")
    for heading in ("tokens", f"optimizer\nsteps{many}", "trained", "FLOPs", "on disk"):
        made.add_column(heading, justify="right")
    for index, step in enumerate(found.steps):
        made.add_row(
            f"{index} {step.verb}",
            f"{step.tokens:,}",
            f"{step.optimizer_steps:,}" if step.optimizer_steps else "-",
            f"{step.trained:,}" if step.trained else "-",
            f"{step.flops:.2e}" if step.flops else "-",
            _gigabytes(step.disk) if step.disk else "-",
        )
    return made


def _memory(found: Plan) -> Table:
    from rich import box
    from rich.table import Table

    trains = any(step.states is not None for step in found.steps)
    what = "weights, gradients and Adam" if trains else "weights alone: no step trains"
    made = Table(box=box.SIMPLE, caption=f"on one GPU: {what}", caption_justify="left")
    made.add_column("memory")
    for processes in found.memory:
        made.add_column(f"{processes} GPU{'s' if processes != '1' else ''}", justify="right")
    for stage in next(iter(found.memory.values())):
        cells = [_gigabytes(stages[stage]) for stages in found.memory.values()]
        made.add_row(f"ZeRO-{stage}", *cells)
    return made


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count < 1e12 else f"{count / 1e9:,.0f} GB"
