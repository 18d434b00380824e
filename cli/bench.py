"""`moe-tools bench`: what routing and clustering cost in time."""

from __future__ import annotations

import argparse

from moe_tools.cli.options import json_target, positive

SUMMARY = "time an FFN dense and routed, or the clustering of its neurons"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("what", nargs="?", choices=("ffn", "clustering"), default="ffn")
    parser.add_argument("--shape", default="smollm2-135m", help="smollm2-135m or llama2-7b")
    parser.add_argument("--expert-size", type=positive, default=8, help="neurons; of ffn")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of ffn")
    parser.add_argument(
        "--json", type=json_target, metavar="FILE", help="write the figures; - is standard output"
    )


def run(args: argparse.Namespace) -> int:
    """Prints one line a figure; all figures of one call come from one run."""
    import json
    import sys

    from moe_tools.cli.common import write_text

    lines, figures = _ffn(args) if args.what == "ffn" else _clustering(args)
    print("\n".join(lines), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json:
        write_text(json.dumps({args.what: figures}, indent=1), args.json)
    return 0


def _ffn(args: argparse.Namespace) -> tuple[list[str], list[dict[str, object]]]:
    from moe_tools.cli.common import DTYPES
    from moe_tools.measure.bench import bench_ffn

    timings = bench_ffn(args.shape, expert_size=args.expert_size, dtype=DTYPES[args.dtype])
    lines = [
        f"{t.operation:<20}{t.tokens:>4} tokens   dense {t.dense_ms:8.3f} ms   "
        f"routed {t.routed_ms:8.3f} ms   {t.ratio:.2f}x"
        for t in timings
    ]
    title = f"{args.shape}, experts of {args.expert_size}, {args.dtype}"
    return [title, *lines], [timing.to_dict() for timing in timings]


def _clustering(args: argparse.Namespace) -> tuple[list[str], list[dict[str, object]]]:
    from moe_tools.measure.bench_clustering import bench_clustering

    found = bench_clustering(args.shape)
    lines = [
        f"{c.by:<14}{c.neurons} x {c.width} into {c.experts}   {c.seconds:7.2f} s   "
        f"objective {c.objective:.2f}   sizes {c.smallest} to {c.largest}"
        for c in found
    ]
    return lines, [one.to_dict() for one in found]
