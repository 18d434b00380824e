"""Options that several verbs share. Imports no torch: `--help` stays instant."""

from __future__ import annotations

import argparse
from pathlib import Path

BLOCK_LENGTH = "tokens; default: 512, or the context of the model if that is shorter"
"""The help of --block-length."""
TASKS = ("lm", "classify", "regress", "seq2seq")
"""Values of `moe_tools.data.tasks.Task`."""
BASELINES = ("int8", "int4", "teal", "cats", "few_bits", "griffin")
"""Keys of `moe_tools.runs.baselines.BASELINES`."""
PICTURES = (".png", ".svg", ".pdf")
PROTOCOLS = ("wikitext2", "wikitext103", "c4", "ptb")
"""Keys of `moe_tools.data.protocols.PROTOCOLS`."""
PAPERS = ("prosparse", "turbosparse", "lte", "teal", "cmoe")
"""Keys of `moe_tools.measure.task_groups.GROUPS`."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype and --device of a model that is read (`moe_tools.cli.common.pick_dtype`)."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the weights; auto: bf16 where the device computes in it, else fp32",
    )
    _add_device_option(parser)


def add_donor_options(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype and --device of a model that is converted and written."""
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights")
    _add_device_option(parser)


def _add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: auto")


def add_baseline_options(parser: argparse.ArgumentParser) -> None:
    """Adds --baselines and --after."""
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=BASELINES,
        default=(),
        metavar="NAME",
        help=f"training-free bars on the same text: {', '.join(BASELINES)}",
    )
    parser.add_argument(
        "--after",
        type=zero_or_more,
        metavar="N",
        help="predict only what follows the first N tokens of every block; default: 0, with the "
        "baseline griffin half of a block",
    )


def add_protocol_options(parser: argparse.ArgumentParser, instead: str) -> None:
    """Adds --protocol and --stride; `instead` is the option that names a copy of the text."""
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="perplexity as the papers measure it: the whole test text, in windows of 2048 tokens; "
        f"from the hub, or from what {instead} names",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="windows of a protocol overlap, and of each but the first only the last N tokens are "
        "predicted",
    )


def check_protocol_options(args: argparse.Namespace, *options: str) -> None:
    """Checks that nothing says how to read a protocol where there is none.

    Args:
        args: parsed.
        options: of `args`, that only a protocol has, beside --stride.

    Raises:
        ValueError: something does.
    """
    for option in ("stride", *options):
        if getattr(args, option) is not None and args.protocol is None:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is of a protocol: add --protocol ({', '.join(PROTOCOLS)})")


def add_packing_options(parser: argparse.ArgumentParser) -> None:
    """Adds --optimize, and how to pack (`moe_tools.optimize`)."""
    parser.add_argument("--optimize", action="store_true", help="run on the sparse kernels")
    parser.add_argument(
        "--packed-dtype",
        choices=("fp32", "bf16", "fp16", "int8", "int4"),
        help="of the FFNs' weights with --optimize; default: that of --dtype",
    )
    parser.add_argument(
        "--linears", choices=("int8", "int4"), help="with --optimize: attention and head, too"
    )
    parser.add_argument(
        "--screen",
        type=float,
        metavar="SIGMAS",
        help="with --optimize, of ReLU and its kin: an int8 copy of the gate goes first; 4 is a "
        "safe margin, inf misses nothing",
    )


def check_packing_options(args: argparse.Namespace) -> None:
    """Checks that nothing says how to pack where nothing is packed.

    Raises:
        ValueError: something does.
    """
    for option in ("packed_dtype", "linears", "screen"):
        if getattr(args, option) is not None and not args.optimize:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is of the sparse kernels: add --optimize")


def add_json_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --json, which writes `what`."""
    parser.add_argument(
        "--json", type=json_target, metavar="FILE", help=f"write {what}; - is standard output"
    )


def json_target(word: str) -> str:
    """An argparse type: `-` or a file that can be made; better known before the work than after."""
    if word != "-" and (Path(word).is_dir() or not Path(word).parent.is_dir()):
        raise argparse.ArgumentTypeError(f"{word!r} is no file in a folder that exists")
    return word


def file_target(word: str) -> str:
    """An argparse type: a file that can be made or gone on with."""
    if word == "-":
        raise argparse.ArgumentTypeError("'-' is no file")
    return json_target(word)


def new_target(word: str) -> str:
    """An argparse type: a file that is not there yet and can be made."""
    if Path(word).exists():
        raise argparse.ArgumentTypeError(f"{word!r} exists: choose another name, or remove it")
    return file_target(word)


def plot_target(word: str) -> str:
    """An argparse type: a picture file that can be made."""
    if Path(word).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{word!r} is no picture: use {', '.join(PICTURES)}")
    return json_target(word)


def positive(word: str) -> int:
    """An argparse type: a whole number of at least 1."""
    return _whole(word, least=1)


def zero_or_more(word: str) -> int:
    """An argparse type: a whole number of at least 0."""
    return _whole(word, least=0)


def _whole(word: str, least: int) -> int:
    try:
        value = int(word.replace("_", ""))
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number of at least {least}")
    return value


def not_negative(word: str) -> float:
    """An argparse type: a finite number of at least 0."""
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{word!r} is no number of at least 0")
    return value


def above_0(word: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{word!r} is no number above 0")
    return value


def share(word: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    value = not_negative(word)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not above 0 and at most 1")
    return value
