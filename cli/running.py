"""Running a recipe, as `convert` and `train` do: the options of both, the run, the closing table.

Imports no torch before the run: `--help` stays instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_tools import processes
from moe_tools.cli.dry_run import add_dry_run_options, dry_run
from moe_tools.cli.options import TASKS, above_0, add_donor_options, add_json_option, positive

if TYPE_CHECKING:
    from moe_tools.recipe import Recipe
    from moe_tools.report.setup import Setup


@dataclass(frozen=True)
class Job:
    """A recipe on a model; each field is the option of that name."""

    recipe: Recipe
    model: str
    output: str
    deepspeed: Mapping[str, Any] | None = None
    """The content of the JSON file, checked against the recipe."""
    report_to: tuple[str, ...] = ()
    control: bool = False
    keep_steps: bool = False
    stream: bool | None = None
    dtype: str = "bf16"
    device: str = "auto"
    eval_tokens: int = 0
    """Held-out tokens of the closing table; 0: no table."""
    json: str | None = None
    """A file for the rows of the table, or - for standard output."""
    compile: bool = False
    attention: str | None = None
    max_hours: float | None = None
    peak_flops: float | None = None


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `convert` and `train` share: all options but those that name the recipe."""
    parser.add_argument("--model", required=True, help="donor: folder, hub id or GGUF file")
    parser.add_argument("--output", help="new folder; the same command resumes it")
    _add_recipe_options(parser)
    parser.add_argument("--deepspeed", metavar="JSON", help="a file, or zero0, zero1, zero2, ...")
    parser.add_argument(
        "--report-to", nargs="+", default=[], metavar="NAME", help="tensorboard, wandb, ..."
    )
    _add_speed_options(parser)
    parser.add_argument("--control", action="store_true", help="also train the dense control")
    parser.add_argument("--keep-steps", action="store_true", help="keep the folder of every step")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="one layer in memory at a time, where no step trains the whole model; default: where "
        "the model needs half of what is free",
    )
    add_donor_options(parser)
    add_json_option(parser, "the table of convert, or with --dry-run the plan")
    add_dry_run_options(parser)


def _add_speed_options(parser: argparse.ArgumentParser) -> None:
    """Adds how train steps are computed, and for how long."""
    parser.add_argument("--compile", action="store_true", help="train steps under torch.compile")
    parser.add_argument(
        "--attention",
        choices=("sdpa", "eager", "flash_attention_2", "flash_attention_3"),
        help="of train steps; default: what transformers takes for the model",
    )
    parser.add_argument(
        "--max-hours",
        type=above_0,
        metavar="H",
        help="stop at a checkpoint after so many hours, with exit code 75; the same command goes "
        "on from it",
    )
    parser.add_argument(
        "--peak-flops",
        type=above_0,
        metavar="F",
        help="FLOPs a second that one device can do at most, e.g. 989e12, for the share that is "
        "used; default: that of a known GPU",
    )


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Adds what overrides the recipe (`moe_tools.recipe.with_options`)."""
    parser.add_argument("--target-sparsity", type=float, help="share of FFN neurons off, in (0, 1)")
    parser.add_argument("--expert-size", type=positive, help="neurons of one expert")
    parser.add_argument("--tokens", type=positive, help="training tokens over all steps")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE[:COLUMN][:WEIGHT]",
        help="docs, a file or folder, a hub dataset, or self; several are mixed",
    )
    parser.add_argument("--task", choices=TASKS, help="what is learned; default: the recipe's")
    parser.add_argument("--epochs", type=float, help="in place of tokens: how often all is read")
    parser.add_argument("--block-length", type=positive, help="tokens of one training block")
    parser.add_argument(
        "--packing",
        choices=("joined", "isolated", "padded"),
        help="how texts share a row: end to end, apart, or one in each",
    )
    parser.add_argument(
        "--bos", choices=("auto", "always", "never"), help="whether rows of text begin with BOS"
    )
    parser.add_argument("--seed", type=int)


def run_file(args: argparse.Namespace, file: str | Path, *, eval_tokens: int = 0) -> int:
    """Runs a recipe file under the options of `add_run_options`, or says what a run would do."""
    from moe_tools.checkpoint.block_length import check_given
    from moe_tools.data.sources import JOIN
    from moe_tools.recipe import read_recipe, with_options
    from moe_tools.recipe.deepspeed import deepspeed_path, read_deepspeed
    from moe_tools.runs.prepare import prepare

    recipe = with_options(
        read_recipe(file),
        target_sparsity=args.target_sparsity,
        expert_size=args.expert_size,
        tokens=args.tokens,
        epochs=args.epochs,
        data=None if args.data is None else JOIN.join(args.data),
        block_length=args.block_length,
        packing=args.packing,
        bos=args.bos,
        seed=args.seed,
        task=args.task,
    )
    if args.block_length is not None:
        check_given(args.model, args.block_length)
    recipe = prepare(recipe, args.model)
    config = None
    if args.deepspeed is not None:
        path = deepspeed_path(args.deepspeed)
        config = read_deepspeed(path, recipe, dtype=args.dtype, processes=processes.count())
    if args.dry_run:
        return dry_run(recipe, args)
    if args.output is None:
        raise ValueError("--output is required, except with --dry-run")
    job = Job(
        recipe,
        model=args.model,
        output=args.output,
        deepspeed=config,
        report_to=tuple(args.report_to),
        control=args.control,
        keep_steps=args.keep_steps,
        stream=args.stream,
        dtype=args.dtype,
        device=args.device,
        eval_tokens=eval_tokens,
        json=args.json,
        compile=args.compile,
        attention=args.attention,
        max_hours=args.max_hours,
        peak_flops=args.peak_flops,
    )
    execute(job)
    return 0


def execute(job: Job) -> None:
    """Runs a recipe; then, of a model that fits in memory, prints the table of `evaluate`.

    Raises:
        ValueError: a user's mistake; what can be known before the run is said before it.
        FloatingPointError: a loss is not finite.
        TimeIsUp: `max_hours` are over; the same job goes on.
    """
    from moe_tools.cli.common import DTYPES, use_device
    from moe_tools.runs.run import run
    from moe_tools.steps.launch import Launch, check_launch
    from moe_tools.steps.time_limit import TimeLimit

    dtype, device = DTYPES[job.dtype], use_device(job.device)
    launch = Launch(
        device,
        job.deepspeed,
        job.report_to,
        compile=job.compile,
        attention=job.attention,
        limit=None if job.max_hours is None else TimeLimit(job.max_hours),
        peak_flops=job.peak_flops,
    )
    check_launch(launch, dtype)
    table = _plan_table(job, device)
    # DeepSpeed speaks on standard output, which is for results.
    with redirect_stdout(sys.stderr), processes.process_group(device, alone=bool(job.deepspeed)):
        run(
            job.recipe,
            job.model,
            job.output,
            dtype=dtype,
            device=device,
            control=job.control,
            keep_steps=job.keep_steps,
            launch=launch,
            stream=job.stream,
        )
    if table is not None:
        _show_table(job, table)


def _plan_table(job: Job, device: str) -> Setup | None:
    """Decides what the closing table measures; None: there is no table.

    A model that is too large for the memory has none.

    Raises:
        ValueError: there is no held-out text, or none that the model can take: better known before
            the run than after.
    """
    from moe_tools.cli.common import DTYPES
    from moe_tools.report.compare import Bench
    from moe_tools.runs.stream import is_large
    from moe_tools.runs.study import held_out_setup

    dtype = DTYPES[job.dtype]
    if not job.eval_tokens:
        return None
    if is_large(job.model, dtype) if job.stream is None else job.stream:
        return None
    setup = held_out_setup(job.recipe, tokens=job.eval_tokens, dtype=dtype, device=device)
    Bench(setup, job.model).check(job.model)
    return setup


def _show_table(job: Job, setup: Setup) -> None:
    from moe_tools.cli.common import quiet_transformers, show_rows
    from moe_tools.report.compare import compare

    with quiet_transformers():
        rows = compare([job.output], setup)
    show_rows(rows, job.json)
