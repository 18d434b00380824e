"""`moe-tools recommend`: what is worth doing to a model without training it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moe_tools.cli.options import BLOCK_LENGTH, add_json_option, add_model_options, positive

if TYPE_CHECKING:
    from moe_tools.runs.recommend import Choice, Use

SUMMARY = "measure what needs no training on your model and text, and name the cheapest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("model", help="dense model: folder, hub id or GGUF file")
    parser.add_argument(
        "--max-loss",
        type=float,
        default=1.05,
        metavar="X",
        help="perplexity over the dense model's that you accept; default: 1.05",
    )
    parser.add_argument(
        "--for",
        dest="use",
        default="decode",
        metavar="USE",
        help="decode (one sequence), batch:4 or batch:16 (so many together), or prefill; default: "
        "decode",
    )
    parser.add_argument(
        "--data", default="docs", help="docs, FILE[:COLUMN], a folder, a hub dataset"
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        default=(0.3, 0.5, 0.65),
        metavar="S",
        help="shares of the neurons (teal: of the inputs) that are off; default: 0.3 0.5 0.65",
    )
    parser.add_argument("--tokens", type=positive, default=8192, help="held-out; default: 8192")
    parser.add_argument("--block-length", type=positive, help=BLOCK_LENGTH)
    parser.add_argument("--seed", type=int, default=0)
    add_json_option(parser, "the rows and what was chosen")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the curve, and what to do; with `--json -` both go to standard error."""
    import json

    from moe_tools.bench.read_rate import read_rate
    from moe_tools.checkpoint.block_length import chosen_length
    from moe_tools.cli.common import (
        pick_dtype,
        quiet_transformers,
        table_file,
        use_device,
        write_text,
    )
    from moe_tools.report.report import print_table
    from moe_tools.report.setup import Setup
    from moe_tools.runs.recommend import PREFILL, Use, recommend

    use = Use.parse(args.use)
    file = table_file(args.json)
    if use.kind == "prefill":
        print(PREFILL, file=file)
        if args.json:
            write_text(json.dumps({"for": args.use, "chosen": None, "rows": []}), args.json)
        return 0
    device = use_device(args.device)
    setup = Setup(
        data=args.data,
        tokens=args.tokens,
        block_length=chosen_length(args.model, args.block_length),
        dtype=pick_dtype(args.dtype, device),
        device=device,
        seed=args.seed,
    )
    with quiet_transformers():
        choice = recommend(args.model, setup, args.budgets, args.max_loss, use)
    rate = read_rate(device)
    print_table(choice.rows, file)
    print(_advice(choice, use, args.max_loss, rate), file=file)
    if args.json:
        found = {
            "for": args.use,
            "max_loss": args.max_loss,
            "bytes_per_second": rate,
            "chosen": choice.chosen.to_dict(),
            "commands": choice.commands,
            "recipe": choice.recipe,
            "rows": [row.to_dict() for row in choice.rows],
        }
        write_text(json.dumps(found, indent=1, allow_nan=False), args.json)
    return 0


def _advice(choice: Choice, use: Use, max_loss: float, rate: float) -> str:
    from moe_tools.runs.recommend import read_bytes

    dense, chosen = choice.rows[0], choice.chosen
    before, after = (read_bytes(row, use) for row in (dense, chosen))
    within = f"within {max_loss:g}x of the dense model's perplexity"
    if chosen.role == "donor":
        first = f"Keep it dense: no method that was tried reads fewer bytes {within}."
    else:
        kept = " Keep it dense." if chosen.ffn_sparsity == 0 else ""
        first = (
            f"{chosen.model} reads the fewest bytes {within}: {after / before:.2f}x of the dense "
            f"model's in bf16, at {chosen.ratio_to_donor:.3f}x its perplexity.{kept}"
        )
    speed = (
        f"Memory was measured to read {rate / 1e9:.1f} GB/s here: that is a limit of "
        f"{use.sequences * rate / after:.0f} tokens/s, where the dense model in bf16 has one of "
        f"{use.sequences * rate / before:.0f}. It is the memory's limit, not a measured speed; "
        "`moe-tools bench` measures."
    )
    lines = [first, speed]
    if choice.recipe:
        lines += ["Save as recipe.yaml:", "", choice.recipe.rstrip(), ""]
    return "\n".join([*lines, *(f"  {command}" for command in choice.commands)])
