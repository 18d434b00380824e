"""`moe-tools convert`: a dense model in, a converted one out."""

from __future__ import annotations

import argparse

from moe_tools.cli.dry_run import add_dry_run_options, dry_run
from moe_tools.cli.options import json_target, positive, zero_or_more

SUMMARY = "turn a dense model into one that computes only what a token needs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", help="a published method, e.g. lte (see `moe-tools recipes`)")
    what.add_argument("--recipe", help="a recipe file of your own")
    parser.add_argument("--model", required=True, help="donor: folder, hub id or GGUF file")
    parser.add_argument("--output", help="new folder; the same command resumes it")
    parser.add_argument("--target-sparsity", type=float, help="share of FFN neurons off, in (0, 1)")
    parser.add_argument("--expert-size", type=positive, help="neurons of one expert")
    parser.add_argument("--tokens", type=positive, help="training tokens over all steps")
    parser.add_argument("--data", help="docs, a file or folder, a hub dataset, or self")
    parser.add_argument("--block-length", type=positive, help="tokens of one training block")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--control", action="store_true", help="also train the dense control")
    parser.add_argument("--keep-steps", action="store_true", help="keep the folder of every step")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="one layer in memory at a time; default: where the model needs half of what is free",
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: auto")
    parser.add_argument(
        "--eval-tokens",
        type=zero_or_more,
        default=32768,
        help="0 skips the closing table; a streamed model has none, for it is needed whole",
    )
    parser.add_argument(
        "--json", type=json_target, metavar="FILE", help="write the table; - is standard output"
    )
    add_dry_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the recipe; then, of a model that fits in memory, the table of `moe-tools evaluate`."""
    from moe_tools.cli.common import DTYPES, use_device
    from moe_tools.recipe import read_recipe, recipe_path, with_options

    recipe = with_options(
        read_recipe(args.recipe or recipe_path(args.method)),
        target_sparsity=args.target_sparsity,
        expert_size=args.expert_size,
        tokens=args.tokens,
        data=args.data,
        block_length=args.block_length,
        seed=args.seed,
    )
    if args.dry_run:
        return dry_run(recipe, args)
    if args.output is None:
        raise ValueError("--output is required, except with --dry-run")
    from moe_tools.runs.run import run as run_recipe
    from moe_tools.runs.stream import is_large

    device = use_device(args.device)
    large = is_large(args.model, DTYPES[args.dtype]) if args.stream is None else args.stream
    eval_tokens = 0 if large else args.eval_tokens
    if eval_tokens:
        _check_table_text(recipe.data, args.model, recipe.block_length)
    run_recipe(
        recipe,
        args.model,
        args.output,
        dtype=DTYPES[args.dtype],
        device=device,
        control=args.control,
        keep_steps=args.keep_steps,
        stream=args.stream,
    )
    if not eval_tokens:
        return 0
    from moe_tools.cli.main import main

    data = [] if recipe.data == "self" else ["--data", recipe.data]
    json = ["--json", args.json] if args.json else []
    text = ["--tokens", str(eval_tokens), "--block-length", str(recipe.block_length)]
    return main(
        ["evaluate", args.output, *data, *text, "--device", device, "--dtype", args.dtype, *json]
    )


def _check_table_text(data: str, model: str, block_length: int) -> None:
    """One held-out block at least: better known before the training than after."""
    from moe_tools.checkpoint.loading import load_tokenizer
    from moe_tools.data import blocks

    source = "docs" if data == "self" else data
    tokenizer = load_tokenizer(model)
    blocks(source, tokenizer, split="heldout", length=block_length, tokens=block_length)
