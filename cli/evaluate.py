"""`moe-tools evaluate`: models beside their donors and dense controls."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moe_tools.cli.options import (
    BLOCK_LENGTH,
    PAPERS,
    TASKS,
    add_baseline_options,
    add_json_option,
    add_model_options,
    add_protocol_options,
    check_protocol_options,
    plot_target,
    positive,
)
from moe_tools.names import RECIPE

if TYPE_CHECKING:
    from moe_tools.data import Task

SUMMARY = "measure perplexity, bytes a token and FLOPs beside the dense model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("folder", nargs="+", help="converted or dense model")
    parser.add_argument("--donor", help="dense model to compare with; default: the folder's own")
    parser.add_argument(
        "--data",
        help="held-out: docs, FILE[:COLUMN], a folder, a hub dataset; default: the recipe's; with "
        "--protocol, a copy of its text",
    )
    add_protocol_options(parser, "--data")
    parser.add_argument(
        "--tokens", type=positive, help="default: 32768; with --protocol, the whole text"
    )
    parser.add_argument(
        "--block-length", type=positive, help=f"{BLOCK_LENGTH}; with --protocol, 2048 for 512"
    )
    parser.add_argument(
        "--batch-size", type=positive, help="blocks; default: 4, of a protocol's long windows 1"
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="what the models were made for; default: as the recipe in the folder says, else as "
        "the model's head does",
    )
    parser.add_argument("--seed", type=int, default=0, help="which tokens of an encoder are masked")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=(),
        metavar="NAME",
        help="tasks of lm-evaluation-harness beside the perplexity (pip install "
        f"'moe-tools[eval]'), or a paper's: {', '.join(PAPERS)}",
    )
    parser.add_argument(
        "--probes",
        nargs="?",
        type=positive,
        const=200,
        default=0,
        metavar="N",
        help="questions that need no data set, N of each kind (200): sums, copying, recall and "
        "patterns, which a model loses before its perplexity shows it",
    )
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="prompts of --tasks begin with BOS; default: as the paper asks, else as the harness "
        "does it",
    )
    parser.add_argument("--task-folder", metavar="DIR", help="task files of your own, in YAML")
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="examples of each task; rows of seq2seq that are generated, default: 64",
    )
    parser.add_argument(
        "--sweep",
        nargs="*",
        type=float,
        metavar="VALUE",
        help="each folder at these values of tau, of top-k's share or of p; default: tenths",
    )
    parser.add_argument(
        "--operate",
        nargs="+",
        type=float,
        metavar="S",
        help="each folder with these shares off, of its neurons and of its inputs, whichever its "
        "method leaves out; one line for all FFNs is found on training text",
    )
    add_baseline_options(parser)
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        default=(0.25, 0.5, 0.75),
        metavar="S",
        help="shares of the neurons (teal: of the inputs) that baselines leave off; default: "
        "0.25 0.5 0.75",
    )
    parser.add_argument(
        "--plot",
        type=plot_target,
        metavar="FILE",
        help="perplexity over FFN bytes and FLOPs: png, svg, pdf",
    )
    add_json_option(parser, "the rows")
    parser.add_argument(
        "--card", action="store_true", help="leave the figures in the folder and in its model card"
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluates, and prints the table; with `--json -` the table goes to standard error."""
    from moe_tools.checkpoint.block_length import DEFAULT, chosen_length
    from moe_tools.checkpoint.card import check_card
    from moe_tools.cli.common import pick_dtype, quiet_transformers, show_rows, use_device
    from moe_tools.data.protocols import WINDOW
    from moe_tools.extras import needed
    from moe_tools.measure.tasks import Tasks
    from moe_tools.report.card import write_figures
    from moe_tools.report.compare import compare
    from moe_tools.report.plot import plot
    from moe_tools.report.setup import Setup
    from moe_tools.runs.baselines import default_after, measure_beside
    from moe_tools.runs.sweep import sweep

    check_protocol_options(args)
    if args.plot:
        needed("matplotlib", "plot", "--plot")
    device = use_device(args.device)
    longest = DEFAULT if args.protocol is None else WINDOW
    length = chosen_length(args.folder[0], args.block_length, longest)
    own = None if args.protocol is not None else args.data
    setup = Setup(
        data=own or _recipe_data(args.folder[0]),
        protocol=args.protocol,
        copy=args.data if own is None else None,
        stride=args.stride,
        tokens=args.tokens or (32768 if args.protocol is None else None),
        block_length=length,
        after=default_after(args.after, args.baselines, length),
        batch_size=args.batch_size or (4 if args.protocol is None else 1),
        dtype=pick_dtype(args.dtype, device),
        device=device,
        seed=args.seed,
        task=args.task or _recipe_task(args.folder[0]),
        tasks=Tasks(tuple(args.tasks), args.task_folder, args.limit, args.bos),
        probes=args.probes,
    )
    if args.operate and args.sweep is not None:
        raise ValueError("--sweep and --operate both say where a folder works: give one")
    if args.card:
        if len(args.folder) > 1:
            raise ValueError(f"--card takes one folder, not {len(args.folder)}")
        check_card(Path(args.folder[0]))
    beside = partial(
        measure_beside,
        names=args.baselines,
        budgets=args.budgets,
        folder=args.folder[0],
        donor=args.donor,
    )
    with quiet_transformers():
        if args.sweep is None and not args.operate:
            rows = compare(args.folder, setup, donor=args.donor, beside=beside)
        else:
            by = bool(args.operate)
            values = args.operate or args.sweep
            given = {"by_sparsity": by, "donor": args.donor, "beside": beside}
            rows = sweep(args.folder, setup, values, **given)
    if args.card:
        write_figures(Path(args.folder[0]), rows)
    show_rows(rows, args.json)
    if args.plot:
        plot(rows, args.plot)
    return 0


def _recipe_data(folder: str) -> str:
    """Returns the text that the folder's run was trained on, docs without a recipe."""
    from moe_tools.recipe import read_recipe
    from moe_tools.report.setup import held_out

    file = Path(folder) / RECIPE
    return held_out(read_recipe(file).data) if file.is_file() else "docs"


def _recipe_task(folder: str) -> Task | None:
    """Returns what the folder's run was made for; None without a recipe, which asks the head."""
    from moe_tools.recipe import read_recipe

    file = Path(folder) / RECIPE
    try:
        return read_recipe(file).task if file.is_file() else None
    except ValueError:  # of another version, maybe
        return None
