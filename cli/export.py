"""`moe-tools export`: a converted model in another program's format."""

from __future__ import annotations

import argparse

from moe_tools.cli.options import add_json_option, positive

SUMMARY = "write a model in the format of another program"
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("folder", help="converted model: folder or hub id")
    parser.add_argument(
        "--to",
        default="dense",
        metavar="FORMAT",
        help="dense: a stock folder of the same weights, without routers (default); moe: a stock "
        "MoE folder, for transformers and vLLM; gguf: a file for llama.cpp; powerinfer: a file for "
        "PowerInfer",
    )
    parser.add_argument("--output", required=True, help="new folder or file")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of a folder's weights")
    parser.add_argument("--type", choices=TYPES, help="of a GGUF file's matrices; default: f16")
    parser.add_argument(
        "--tokenizer", metavar="FILE.gguf", help="whose tokenizer is copied; default: the donor's"
    )
    parser.add_argument(
        "--top-k",
        type=positive,
        metavar="K",
        help="routed experts of every token, in place of the folder's own selector",
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare what was written with the folder, FFN by FFN and in perplexity (default)",
    )
    parser.add_argument("--data", default="docs", help="text of the check; default: docs")
    parser.add_argument("--tokens", type=positive, default=2048, help="of the check; default: 2048")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")
    add_json_option(parser, "the content of export.json")


def run(args: argparse.Namespace) -> int:
    """Writes it, and prints how it compares; nothing that exists is overwritten."""
    import json

    from moe_tools.cli.common import DTYPES, quiet_transformers, table_file, write_text
    from moe_tools.export import Checking, Options, export

    options = Options(
        dtype=DTYPES[args.dtype] if args.dtype else None,
        type=args.type,
        tokenizer=args.tokenizer,
        top_k=args.top_k,
    )
    with quiet_transformers():
        done = export(
            args.folder,
            args.output,
            to=args.to,
            options=options,
            checking=Checking(args.data, args.tokens) if args.check else None,
            dry_run=args.dry_run,
        )
    for line in done.lines():
        print(line, file=table_file(args.json))
    if args.json:
        write_text(json.dumps(done.to_dict(), indent=2), args.json)
    return 0
