"""`moe-tools doctor`: what a model and this machine offer to a conversion."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moe_tools.cli.options import add_json_option, not_negative, positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moe_tools.experts.conversion import Conversion
    from moe_tools.measure.diagnose import Diagnosis

LENGTH = 256
"""A block of text has at most so many tokens."""
SUMMARY = "say whether and how a model can be converted, and what this machine has"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("model", help="folder, hub id or GGUF file")
    parser.add_argument("--data", default="docs", help="text for its sparsity; default: docs")
    parser.add_argument("--tokens", type=positive, default=256, help="of that text; default: 256")
    parser.add_argument(
        "--ppl",
        type=not_negative,
        metavar="P",
        help="also the sparsity at which perplexity is P %% higher; takes minutes",
    )
    add_json_option(parser, "the facts")


def run(args: argparse.Namespace) -> int:
    """Prints one fact a line."""
    from moe_tools.checkpoint.loading import load
    from moe_tools.cli.common import quiet_transformers, write_text
    from moe_tools.measure.diagnose import diagnose

    with quiet_transformers():
        model = load(args.model)
        found = diagnose(model)
        tokenizer = _tokenizer(args.model)
        natural = _natural(args, model) if tokenizer else None
    machine = _machine()
    if args.json:
        write_text(json.dumps(_facts(found, natural, tokenizer, machine), indent=1), args.json)
    if args.json != "-":
        for name, value in _lines(found, natural, tokenizer, machine):
            print(f"{name:<12} {value}")
    return 0


def _natural(args: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    """Measures the sparsity of the dense model on a little training text."""
    from dataclasses import asdict

    from moe_tools.checkpoint.loading import load_tokenizer
    from moe_tools.data import blocks
    from moe_tools.data.limits import context_length
    from moe_tools.measure.natural import natural_sparsity, observe
    from moe_tools.measure.truncation import sparsity_within

    length = min(LENGTH, args.tokens, context_length(model) or LENGTH)
    tokenizer = load_tokenizer(args.model)
    text_BT = blocks(args.data, tokenizer, split="train", length=length, tokens=args.tokens)
    facts = {"data": args.data, "tokens": text_BT.numel()}
    facts |= asdict(natural_sparsity(observe(model, text_BT)))
    if args.ppl is not None:
        facts["within"] = asdict(sparsity_within(model, text_BT, args.ppl / 100))
    return facts


def _tokenizer(source: str) -> str | None:
    from moe_tools.checkpoint.loading import load_tokenizer

    try:
        return type(load_tokenizer(source)).__name__
    except ValueError:
        return None


def _machine() -> dict[str, Any]:
    import torch
    import transformers

    from moe_tools.bench.kernels import backends
    from moe_tools.cli.common import pick_dtype
    from moe_tools.waiting import wait_policy

    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "devices": ["cpu", *cuda],
        "auto_dtype": {
            device: str(pick_dtype("auto", device)).removeprefix("torch.")
            for device in ["cpu", *cuda]
        },
        "threads": torch.get_num_threads(),
        "waiting": wait_policy(),
        "kernels": backends(),
    }


def _facts(
    found: Diagnosis,
    natural: dict[str, Any] | None,
    tokenizer: str | None,
    machine: dict[str, Any],
) -> dict[str, Any]:
    from dataclasses import asdict

    shares = {
        "ffn_parameter_share": found.ffn_parameter_share,
        "ffn_flop_share": found.ffn_flop_share,
    }
    facts = {"natural": natural, "tokenizer": tokenizer, "machine": machine}
    return {**asdict(found), **shares, **facts}


def _lines(
    found: Diagnosis,
    natural: dict[str, Any] | None,
    tokenizer: str | None,
    machine: dict[str, Any],
) -> Iterator[tuple[str, str]]:
    yield "model", f"{found.host}, {found.parameters / 1e6:.1f}M parameters, {found.dtype}"
    for shape in found.shapes:
        kind = "gated " if shape.gated else ""
        sizes = ", ".join(map(str, shape.expert_sizes)) or "4 to 64 make experts of two sizes"
        yield "FFNs", f"{shape.count} x {kind}{shape.activation}, D={shape.width} F={shape.neurons}"
        yield "expert size", sizes
    for layout in found.layouts:
        yield "made of", layout
    share, flops = found.ffn_parameter_share, found.ffn_flop_share
    yield "in the FFNs", f"{share:.0%} of the parameters, {flops:.0%} of the FLOPs of a short text"
    if natural is not None:
        yield from _sparsity(natural)
    yield "converted", _conversion(found)
    yield "tokenizer", tokenizer or "none: it cannot be trained or evaluated from this folder"
    yield "software", f"torch {machine['torch']}, transformers {machine['transformers']}"
    for device, dtype in machine["auto_dtype"].items():
        yield "device", f"{device}, {dtype} by default"
    yield "waiting", f"{machine['waiting']} (how PyTorch's threads wait for work)"
    yield "kernels", ", ".join(machine["kernels"])


def _sparsity(natural: dict[str, Any]) -> Iterator[tuple[str, str]]:
    shares = [ffn["sparsity"] for ffn in natural["ffns"]]
    yield (
        "sparsity",
        f"{natural['zeros']:.1%} exact zeros; {natural['sparsity']:.1%} of the neurons can go at "
        f"CETT {natural['cett']:g}, {min(shares):.0%} to {max(shares):.0%} an FFN "
        f"({natural['tokens']} tokens of {natural['data']})",
    )
    if within := natural.get("within"):
        rise = f"perplexity {within['dense_perplexity']:.2f} -> {within['perplexity']:.2f}"
        yield f"PPL-{100 * within['increase']:g}%", f"{within['sparsity']:.1%} can go: {rise}"


def _conversion(found: Diagnosis) -> str:
    made = found.conversion
    if made is None:
        return "no"
    activation = f"{_activation(made)}, " if made.activation else ""
    return f"{activation}{_experts(made)}; from {made.donor}"


def _activation(made: Conversion) -> str:
    options = dict(made.activation or {})
    kind = options.pop("kind")
    if made.activation_of:
        return f"activation {kind} (its own in every FFN)"
    return f"activation {kind} ({_words(options)})" if options else f"activation {kind}"


def _experts(made: Conversion) -> str:
    if made.expert_size is None:
        return "not split"
    if made.router is None:
        return f"split into experts of {made.expert_size} neurons, no router yet"
    return (
        f"experts of {made.expert_size} neurons, router {made.router}, "
        f"selector ({_words(made.selector or {})}), mode {made.mode}"
    )


def _words(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())
