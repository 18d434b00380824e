"""`moe-tools grid`: which split and which router fit a model, without training it."""

from __future__ import annotations

import argparse

from moe_tools.cli.options import (
    BLOCK_LENGTH,
    add_json_option,
    add_model_options,
    file_target,
    positive,
)

SUMMARY = "measure every split with every router, without training the model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("--model", required=True, help="donor: folder, hub id or GGUF file")
    parser.add_argument(
        "--output", required=True, type=file_target, help="file of figures; the command resumes it"
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        default=["kmeans:weights", "kmeans:activations", "coactivation", "random"],
        metavar="SPLIT",
        help="kmeans:activations, kmeans:marks, kmeans:weights, coactivation, random, contiguous",
    )
    parser.add_argument(
        "--routers",
        nargs="+",
        default=["oracle", "mlp", "norm", "ridge", "similarity", "representative", "mean_gate"],
        metavar="ROUTER",
        help="those, or sigmoid; ridge is a sigmoid router in closed form",
    )
    parser.add_argument(
        "--target-sparsity", type=float, nargs="+", default=[0.25, 0.5, 0.75], metavar="S"
    )
    parser.add_argument("--baselines", nargs="*", choices=("teal", "cats"), default=())
    parser.add_argument("--expert-size", type=positive, default=32, help="neurons; default: 32")
    parser.add_argument(
        "--selector", choices=("topk", "threshold", "dynamic_k", "top_p"), default="topk"
    )
    parser.add_argument("--spend", choices=("uniform", "error"), default="uniform")
    parser.add_argument("--when-off", choices=("zero", "mean"), default="zero")
    parser.add_argument(
        "--data", default="docs", help="docs, a file or folder (FILE:COLUMN), a hub dataset"
    )
    parser.add_argument("--tokens", type=positive, default=8192, help="held-out; default: 8192")
    parser.add_argument("--fit-tokens", type=positive, default=32768, help="default: 32768")
    parser.add_argument(
        "--calibration-tokens",
        type=positive,
        default=8192,
        help="for splits, budgets and baselines; default: 8192",
    )
    parser.add_argument("--block-length", type=positive, help=BLOCK_LENGTH)
    parser.add_argument("--seed", type=int, default=0)
    add_json_option(parser, "the figures")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints one line for the donor, then one for each combination."""
    import json
    from dataclasses import asdict
    from pathlib import Path

    from moe_tools.checkpoint.block_length import chosen_length
    from moe_tools.cli.common import (
        pick_dtype,
        quiet_transformers,
        table_file,
        use_device,
        write_text,
    )
    from moe_tools.recipe import Fit
    from moe_tools.report.report import print_cells
    from moe_tools.runs.grid import Grid, explore

    device = use_device(args.device)
    grid = Grid(
        model=args.model,
        splits=tuple(args.splits),
        routers=tuple(args.routers),
        sparsities=tuple(args.target_sparsity),
        baselines=tuple(args.baselines),
        expert_size=args.expert_size,
        selector=args.selector,
        spend=args.spend,
        when_off=args.when_off,
        fit=Fit(tokens=args.fit_tokens, epochs=10, lr=3e-3),
        data=args.data,
        tokens=args.tokens,
        calibration=args.calibration_tokens,
        block_length=chosen_length(args.model, args.block_length),
        seed=args.seed,
        dtype=pick_dtype(args.dtype, device),
        device=device,
    )
    with quiet_transformers():
        cells = [asdict(cell) for cell in explore(grid, Path(args.output))]
    print_cells(cells, table_file(args.json))
    if args.json:
        write_text(json.dumps(cells, indent=1), args.json)
    return 0
