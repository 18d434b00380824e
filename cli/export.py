"""`moe-tools export`: a converted model in another program's format."""

from __future__ import annotations

import argparse

SUMMARY = "write a model in the format of another program"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("folder", help="converted or dense model: folder, hub id or GGUF file")
    parser.add_argument(
        "--format",
        default="dense",
        help="dense: a plain Hugging Face folder of the same weights, without routers (default)",
    )
    parser.add_argument("--output", required=True, help="new folder or file")


def run(args: argparse.Namespace) -> int:
    """Writes it; nothing that exists is overwritten."""
    from moe_tools.cli.common import quiet_transformers
    from moe_tools.export import export

    with quiet_transformers():
        export(args.folder, args.output, format=args.format)
    return 0
