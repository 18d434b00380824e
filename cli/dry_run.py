"""What `--dry-run` shows: a recipe on a model, without weights and before any work."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from moe_tools.cli.options import positive, share

if TYPE_CHECKING:
    from rich.table import Table

    from moe_tools.recipe import Recipe
    from moe_tools.runs.plan import Plan, Source


def add_dry_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds --dry-run, and what says where a run would be."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what would be done and what it takes; needs a config.json, no weights",
    )
    group = parser.add_argument_group("the machine of a --dry-run")
    group.add_argument(
        "--processes", type=positive, default=1, help="that would train together; default: 1"
    )
    group.add_argument(
        "--gpu", default="A100-80GB", metavar="NAME", help="a100-80, h100, ...; default: A100-80GB"
    )
    group.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="default: 8")
    group.add_argument(
        "--mfu",
        type=share,
        default=0.3,
        help="share of the card's FLOP/s that training gets; default: 0.3 (docs/scale.md has why)",
    )
    group.add_argument(
        "--network",
        type=positive,
        default=400,
        metavar="GBIT",
        help="Gbit/s into each node; default: 400",
    )


def dry_run(recipe: Recipe, args: argparse.Namespace) -> int:
    """Prints the plan; `args` has model, dtype, json, and the machine."""
    from moe_tools.cli.common import DTYPES, write_text
    from moe_tools.runs.plan import Machine, plan

    machine = Machine(args.gpu, args.processes, args.gpus_per_node, args.mfu, args.network)
    found = plan(recipe, args.model, dtype=DTYPES[args.dtype], machine=machine)
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
    for line in _sums(found):
        screen.print(line)
    screen.print(_steps(found))
    screen.print(_memory(found))
    if found.needs:
        screen.print(_needs(found))
    screen.print("how each figure is made: docs/scale.md")


def _source(source: Source) -> str:
    kinds = {
        "docs": "documentation inside pinned wheels",
        "self": "the donor's own samples",
        "hub": "a hub dataset, not asked for now",
        "file": "a file or folder" + ("" if source.there else " that is not there"),
    }
    disk = f", {gigabytes(source.disk)} on the disk" if source.disk else ""
    return f"{source.name}: {kinds[source.kind]}; {source.tokens:,} tokens are read{disk}"


def _sums(found: Plan) -> list[str]:
    """Time and disk, a line each."""
    said = []
    machine = found.machine
    if found.flops:
        said.append(
            f"time    {duration(found.hours)} for {found.flops:.2e} FLOPs: {machine.processes} x "
            f"{machine.gpu} at {machine.mfu:.0%} of its bf16 FLOP/s"
        )
    kept = f"{gigabytes(found.checkpoints)} of checkpoints, " if found.checkpoints else ""
    said.append(f"disk    {kept}{gigabytes(found.folder)} of weights in the end")
    return said


def duration(hours: float) -> str:
    """Hours in words: minutes, hours or days."""
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


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
            gigabytes(step.disk) if step.disk else "-",
        )
    return made


def _memory(found: Plan) -> Table:
    from rich import box
    from rich.table import Table

    trains = any(step.states is not None for step in found.steps)
    what = "states, activations and logits" if trains else "weights alone: no step trains"
    made = Table(box=box.SIMPLE, caption=f"on one GPU: {what}", caption_justify="left")
    made.add_column("memory")
    for processes in found.memory:
        made.add_column(f"{processes} GPU{'s' if processes != '1' else ''}", justify="right")
    for way in next(iter(found.memory.values())):
        cells = [gigabytes(ways[way]) for ways in found.memory.values()]
        made.add_row(f"ZeRO-{way}", *cells)
    return made


def _needs(found: Plan) -> Table:
    from rich import box
    from rich.table import Table

    machine = found.machine
    tokens = max(step.step_tokens for step in found.steps)
    made = Table(
        box=box.SIMPLE,
        caption=f"{machine.processes} x {machine.gpu}, {machine.per_node} in a node; "
        "* does not fit\n"
        f"an optimizer step has {tokens:,} tokens, and computes for {seconds(found.step_seconds)}",
        caption_justify="left",
    )
    made.add_column("needs")
    for heading in ("on a GPU", "if layers are\nrecomputed", "on a host", "sent a step", "for"):
        made.add_column(heading, justify="right")
    for need in found.needs:
        made.add_row(
            f"ZeRO-{need.way}",
            gigabytes(need.gpu) + ("" if need.fits else " *"),
            gigabytes(need.gpu_recomputed) + ("" if need.fits_recomputed else " *"),
            gigabytes(need.host) if need.host else "-",
            gigabytes(need.sent) if need.sent else "-",
            seconds(need.sending) if need.sent else "-",
        )
    return made


def seconds(count: float) -> str:
    """Seconds as people read them."""
    return f"{count:.0f} s" if count >= 100 else f"{count:.2g} s"


def gigabytes(count: float) -> str:
    """Bytes as people read them; a GB is 1e9."""
    return f"{count / 1e9:.3g} GB" if count < 1e12 else f"{count / 1e9:,.0f} GB"
