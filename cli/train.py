"""`moe-tools train`: what convert does, in one process or in many, with or without DeepSpeed."""

from __future__ import annotations

import argparse

from moe_tools.cli.dry_run import add_dry_run_options, dry_run
from moe_tools.cli.options import json_target, positive

SUMMARY = "run a recipe on one device or many: plainly, by torchrun or by deepspeed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("recipe", help="a recipe file, or the name of one that comes with us")
    parser.add_argument("--model", required=True, help="donor: folder, hub id or GGUF file")
    parser.add_argument("--output", help="new folder; the same command resumes it")
    parser.add_argument("--deepspeed", metavar="JSON", help="a file, or zero0, zero1, zero2, ...")
    parser.add_argument("--target-sparsity", type=float, help="share of FFN neurons off, in (0, 1)")
    parser.add_argument("--expert-size", type=positive, help="neurons of one expert")
    parser.add_argument("--tokens", type=positive, help="training tokens over all steps")
    parser.add_argument(
        "--data", nargs="+", metavar="SOURCE[:WEIGHT]", help="as of convert; several are mixed"
    )
    parser.add_argument("--block-length", type=positive, help="tokens of one training block")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--control", action="store_true", help="also train the dense control")
    parser.add_argument("--keep-steps", action="store_true", help="keep the folder of every step")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights")
    parser.add_argument("--device", default="auto", help="cpu or cuda; default: auto")
    parser.add_argument(
        "--json", type=json_target, metavar="FILE", help="of --dry-run; - is standard output"
    )
    add_dry_run_options(parser)
    parser.add_argument(
        "--report-to", nargs="+", default=[], metavar="NAME", help="tensorboard, wandb, ..."
    )


def run(args: argparse.Namespace) -> int:
    """Runs the recipe; `moe-tools evaluate` makes the table."""
    from pathlib import Path

    from moe_tools import processes
    from moe_tools.cli.common import DTYPES, use_device
    from moe_tools.data.sources import JOIN
    from moe_tools.recipe import read_recipe, recipe_path, with_options
    from moe_tools.recipe.deepspeed import deepspeed_path, read_deepspeed

    found = Path(args.recipe) if Path(args.recipe).suffix else recipe_path(args.recipe)
    recipe = with_options(
        read_recipe(found),
        target_sparsity=args.target_sparsity,
        expert_size=args.expert_size,
        tokens=args.tokens,
        data=None if args.data is None else JOIN.join(args.data),
        block_length=args.block_length,
        seed=args.seed,
    )
    config = None
    if args.deepspeed is not None:
        path = deepspeed_path(args.deepspeed)
        config = read_deepspeed(path, recipe, dtype=args.dtype, processes=processes.count())
    if args.dry_run:
        return dry_run(recipe, args)
    if args.output is None:
        raise ValueError("--output is required, except with --dry-run")
    from moe_tools.runs.run import run as run_recipe
    from moe_tools.training.launch import Launch, check_launch

    device = use_device(args.device)
    launch = Launch(device, config, tuple(args.report_to))
    check_launch(launch)
    with processes.process_group(device, alone=config is not None):
        run_recipe(
            recipe,
            args.model,
            args.output,
            dtype=DTYPES[args.dtype],
            device=device,
            control=args.control,
            keep_steps=args.keep_steps,
            launch=launch,
        )
    return 0
