"""`moe-tools bench`: what routing and clustering cost in time, what sparse kernels save.

`generate` and `train` time whole models, the other kinds one FFN.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from moe_tools.cli.options import add_json_option, not_negative, plot_target, positive

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from moe_tools.bench.generate import GenerateTiming, Rival
    from moe_tools.bench.llama_cpp import Engine
    from moe_tools.bench.ways import KernelTiming

SUMMARY = "time an FFN, its kernels, its clustering, or a whole model at work or in training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("what", nargs="?", choices=tuple(_KINDS), default="ffn")
    parser.add_argument(
        "folder",
        nargs="?",
        help="of generate: a converted model, else --shape; of train: a dense model, else SmolLM2",
    )
    parser.add_argument(
        "--shape",
        default="smollm2-135m",
        help="smollm2-135m, llama2-7b, mixtral-8x7b, d2048 or DxF",
    )
    parser.add_argument(
        "--expert-size", type=positive, default=8, help="neurons; not of clustering"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="not of clustering"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of kernels (default: cpu)"
    )
    parser.add_argument(
        "--packed-dtype",
        nargs="+",
        choices=("fp32", "bf16", "fp16", "int8", "int4"),
        help="of the packed weights; of kernels, and one of generate; default: --dtype",
    )
    parser.add_argument(
        "--linears",
        choices=("int8", "int4"),
        help="of generate: attention and head in few bits; adds the dense model in as many, too",
    )
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[1], help="tokens; of kernels (default: 1)"
    )
    parser.add_argument(
        "--plot",
        type=plot_target,
        metavar="FILE",
        help="of kernels: a picture, in the format of the suffix",
    )
    parser.add_argument(
        "--repeats", type=positive, help="of kernels (default: 30), generate and train (5)"
    )
    parser.add_argument("--prompt-tokens", type=positive, default=128, help="of generate")
    parser.add_argument("--tokens", type=positive, default=64, help="decoded; of generate")
    parser.add_argument(
        "--sequences", type=positive, default=1, help="that go on together; of generate"
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="of generate: held-out text for the prompts, `docs` or a file; default: random "
        "tokens, whose routing is not that of text",
    )
    parser.add_argument("--threads", type=positive, help="of generate; default: PyTorch's")
    parser.add_argument("--recipe", default="lte_paper", help="of train: its first routed step")
    parser.add_argument("--block-length", type=positive, default=512, help="tokens; of train")
    parser.add_argument(
        "--rotate", type=not_negative, default=1.6, metavar="GB", help="of weights; of kernels"
    )
    parser.add_argument(
        "--against",
        choices=("llama.cpp",),
        help="of generate: time the dense model in it, too, as f16, q8_0 and q4_0; llamas only",
    )
    parser.add_argument(
        "--llama-bench",
        metavar="PATH",
        help="of --against: llama.cpp's program; default: on PATH, else the package llama_cpp",
    )
    add_json_option(parser, "the figures")


def run(args: argparse.Namespace) -> int:
    """Prints one line a figure; all figures of one call come from one run."""
    import json
    from dataclasses import asdict

    from moe_tools.cli.common import table_file, write_text

    if args.folder and args.what not in ("generate", "train"):
        raise ValueError(f"bench {args.what} times a shape, not {args.folder}: use --shape")
    if args.plot and args.what != "kernels":
        raise ValueError(f"bench {args.what} has no picture: leave --plot out, or bench kernels")
    if args.against and args.what != "generate":
        raise ValueError(f"bench {args.what} runs no whole model: --against is of bench generate")
    if args.what != "generate" and (args.sequences > 1 or args.data):
        raise ValueError(
            f"bench {args.what} writes no text: --sequences and --data are of generate"
        )
    if args.against and args.sequences > 1:
        raise ValueError("--against times other programs with one sequence: leave --sequences out")
    if args.llama_bench and not args.against:
        raise ValueError("--llama-bench is for --against llama.cpp: give both")
    lines, timings = _KINDS[args.what](args)
    print("\n".join(lines), file=table_file(args.json))
    if args.json:
        figures = [asdict(timing) for timing in timings]
        write_text(json.dumps({args.what: figures}, indent=1), args.json)
    return 0


def _ffn(args: argparse.Namespace) -> tuple[list[str], Sequence[Any]]:
    from moe_tools.bench.ffn import bench_ffn
    from moe_tools.cli.common import DTYPES

    timings = bench_ffn(args.shape, expert_size=args.expert_size, dtype=DTYPES[args.dtype])
    lines = [
        f"{t.operation:<20}{t.tokens:>4} tokens   dense {t.dense_ms:8.3f} ms   "
        f"routed {t.routed_ms:8.3f} ms   {t.ratio:.2f}x"
        for t in timings
    ]
    title = f"{args.shape}, experts of {args.expert_size}, {args.dtype}"
    return [title, *lines], timings


def _kernels(args: argparse.Namespace) -> tuple[list[str], Sequence[Any]]:
    if args.plot:
        from moe_tools.extras import needed

        needed("matplotlib", "plot", "--plot")
    timings = _cuda_timings(args) if args.device == "cuda" else _cpu_timings(args)
    if args.plot:
        from moe_tools.bench.plot import plot_kernels

        plot_kernels(timings, args.plot)
    lines = [
        f"{t.tokens:>4} x {t.operation:<14} {t.dtype:<8}{t.sparsity:>4.0%} off {t.ms:9.4f} ms "
        f"{t.speedup:6.2f} x F.linear {t.gigabytes_per_second:7.1f} GB/s, "
        f"{t.share_of_bandwidth:4.0%} of the bandwidth"
        for t in timings
    ]
    title = f"{args.shape}, experts of {args.expert_size}, {args.dtype}, {_place(args.device)}"
    return [title, *lines], timings


def _cpu_timings(args: argparse.Namespace) -> list[KernelTiming]:
    from moe_tools.bench.kernels import bench_kernels
    from moe_tools.cli.common import DTYPES, PACKED

    timings = bench_kernels(
        args.shape,
        expert_size=args.expert_size,
        dtype=DTYPES[args.dtype],
        packed=[PACKED[name] for name in args.packed_dtype or ()],
        batches=args.batch,
        repeats=args.repeats or 30,
        rotated=int(args.rotate * 1e9),
    )
    return list(timings)


def _cuda_timings(args: argparse.Namespace) -> list[KernelTiming]:
    from moe_tools.bench.cuda import bench_cuda
    from moe_tools.cli.common import DTYPES

    return bench_cuda(
        args.shape,
        expert_size=args.expert_size,
        dtype=DTYPES[args.dtype],
        repeats=args.repeats or 30,
    )


def _place(device: str) -> str:
    import torch

    return device if device == "cuda" else f"{torch.get_num_threads()} threads"


def _generate(args: argparse.Namespace) -> tuple[list[str], Sequence[Any]]:
    from moe_tools.bench.generate import (
        add_quantized,
        bench_generate,
        folder_models,
        shape_models,
        threads,
    )
    from moe_tools.cli.common import DTYPES, PACKED

    dtype, size, packed = DTYPES[args.dtype], args.expert_size, args.packed_dtype or []
    if len(packed) > 1:
        raise ValueError(f"bench generate times one --packed-dtype, not {', '.join(packed)}")
    engine = _engine(args)
    prompt = _prompt(args) if args.data else args.prompt_tokens
    with threads(args.threads) as used:
        if args.folder:
            models = folder_models(args.folder, dtype)
        else:
            models = shape_models(args.shape, size, dtype)
        few = {}
        if packed or args.linears:
            kind = PACKED[packed[0]] if packed else None
            few = {add_quantized(models, kind, args.linears): kind or dtype}
        with _rivals(args, engine, models["dense"], used) as rivals:
            timings = bench_generate(
                models,
                prompt=prompt,
                tokens=args.tokens,
                sequences=args.sequences,
                rounds=args.repeats or 5,
                packed=few,
                rivals=rivals,
            )
    lines = [
        f"{t.model:<24}{t.sparsity:>5.0%} off   prefill {t.prefill:9.1f} tokens/s "
        f"{t.prefill_speedup:5.2f}x   decode {t.decode:8.1f} tokens/s {t.decode_speedup:5.2f}x "
        f"{t.over_bar:5.2f} x bar" + ("" if args.sequences > 1 else _bytes(t))
        for t in timings
    ]
    title = f"{args.folder or args.shape}, {args.dtype}, {used} threads"
    title += f", {args.sequences} sequences" if args.sequences > 1 else ""
    return [title, *lines, _bar(timings)], timings


def _prompt(args: argparse.Namespace) -> Tensor:
    """Reads the prompts: the first blocks of held-out text."""
    from torch import Tensor

    from moe_tools.checkpoint.loading import load_tokenizer
    from moe_tools.report.setup import Setup, held_out

    if not args.folder:
        raise ValueError("--data needs a model with a tokenizer: give a folder in place of --shape")
    tokens = args.sequences * args.prompt_tokens
    setup = Setup(held_out(args.data), tokens, args.prompt_tokens)
    text = setup.text(load_tokenizer(args.folder), "lm")
    if not isinstance(text, Tensor) or len(text) < args.sequences:
        raise ValueError(
            f"{args.data} has no {args.sequences} blocks of {args.prompt_tokens} held-out tokens"
        )
    return text[: args.sequences]


def _bytes(timing: GenerateTiming) -> str:
    """Says what one sequence reads; several share reads."""
    rate = f"{timing.gigabytes_per_second:6.1f} GB/s, {timing.share_of_read_rate:4.0%}"
    return f"   {timing.bytes_per_token / 1e6:8.1f} MB a token {rate} of the read rate"


def _bar(timings: Sequence[GenerateTiming]) -> str:
    """Names the fastest dense row, and what memory gives."""
    (bar,) = (t for t in timings if t.model == t.bar)
    return (
        f"bar: {bar.model}, the fastest dense model at decoding, {bar.decode:.1f} tokens/s; "
        f"memory is read at {bar.read_rate:.1f} GB/s"
    )


def _engine(args: argparse.Namespace) -> Engine | None:
    """Finds llama.cpp if it is asked for, and refuses a folder that it cannot run, unread."""
    if not args.against:
        return None
    from pathlib import Path

    from moe_tools.bench.llama_cpp import find_llama_cpp
    from moe_tools.checkpoint.loading import read_config
    from moe_tools.export.gguf import plan

    engine = find_llama_cpp(args.llama_bench)
    if args.folder and Path(args.folder).suffix != ".gguf":
        plan(read_config(args.folder))
    return engine


def _rivals(
    args: argparse.Namespace, engine: Engine | None, dense: PreTrainedModel, threads: int
) -> AbstractContextManager[list[Rival]]:
    if engine is None:
        return nullcontext([])
    from moe_tools.bench.llama_cpp import llama_cpp_rivals

    context = args.prompt_tokens + args.tokens + 1
    return llama_cpp_rivals(dense, engine, context=context, threads=threads)


def _clustering(args: argparse.Namespace) -> tuple[list[str], Sequence[Any]]:
    from moe_tools.bench.clustering import bench_clustering

    found = bench_clustering(args.shape)
    lines = [
        f"{c.by:<14}{c.neurons} x {c.width} into {c.experts}   {c.seconds:7.2f} s   "
        f"objective {c.objective:.2f}   sizes {c.smallest} to {c.largest}"
        for c in found
    ]
    return lines, found


def _train(args: argparse.Namespace) -> tuple[list[str], Sequence[Any]]:
    from moe_tools.bench.train import bench_train
    from moe_tools.cli.common import DTYPES, use_device
    from moe_tools.cli.demo import donor_file
    from moe_tools.recipe import read_recipe, recipe_path

    source, device = args.folder or str(donor_file()), use_device("auto")
    timings = bench_train(
        source,
        read_recipe(recipe_path(args.recipe)),
        dtype=DTYPES[args.dtype],
        device=device,
        length=args.block_length,
        rounds=args.repeats or 5,
    )
    lines = [
        f"{t.step:<10}{t.tokens:>7} tokens {t.milliseconds:10.1f} ms   {t.ratio:.2f} x dense"
        for t in timings
    ]
    return [f"{source}, {args.recipe}, {args.dtype}, {device}", *lines], timings


_KINDS = {
    "ffn": _ffn,
    "kernels": _kernels,
    "clustering": _clustering,
    "generate": _generate,
    "train": _train,
}
