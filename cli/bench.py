"""`moe-tools bench`: what routing costs in time, beside the dense FFN."""

from __future__ import annotations

import argparse

from moe_tools.cli.options import json_target, positive

SUMMARY = "time an FFN dense and routed, in one interleaved run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("--shape", default="smollm2-135m", help="smollm2-135m or llama2-7b")
    parser.add_argument("--expert-size", type=positive, default=8, help="neurons; default: 8")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument(
        "--json", type=json_target, metavar="FILE", help="write the figures; - is standard output"
    )


def run(args: argparse.Namespace) -> int:
    """Prints one line an operation."""
    import json
    import sys

    from moe_tools.cli.common import DTYPES, write_text
    from moe_tools.measure.bench import bench_ffn, bench_split

    timings = bench_ffn(args.shape, expert_size=args.expert_size, dtype=DTYPES[args.dtype])
    seconds = bench_split(args.shape, expert_size=args.expert_size)
    out = sys.stderr if args.json == "-" else sys.stdout
    print(f"{args.shape}, experts of {args.expert_size}, {args.dtype}", file=out)
    for t in timings:
        line = f"{t.operation:<20}{t.tokens:>4} tokens   dense {t.dense_ms:8.3f} ms   "
        print(f"{line}routed {t.routed_ms:8.3f} ms   {t.ratio:.2f}x", file=out)
    print(f"balanced k-means of one FFN  {seconds:.2f} s", file=out)
    if args.json:
        rows = [timing.to_dict() for timing in timings]
        write_text(json.dumps({"ffn": rows, "split_seconds": seconds}, indent=1), args.json)
    return 0
