"""`moe-tools doctor`: what a model and this machine offer to a conversion."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moe_tools.cli.options import json_target

if TYPE_CHECKING:
    from moe_tools.measure.diagnose import Diagnosis

SUMMARY = "say whether and how a model can be converted, and what this machine has"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("model", help="folder, hub id or GGUF file")
    parser.add_argument(
        "--json", type=json_target, metavar="FILE", help="write the facts; - is standard output"
    )


def run(args: argparse.Namespace) -> int:
    """Prints one fact a line."""
    from moe_tools.cli.common import quiet_transformers, write_text
    from moe_tools.measure.diagnose import diagnose
    from moe_tools.model.checkpoint import load

    with quiet_transformers():
        found = diagnose(load(args.model))
        tokenizer = _tokenizer(args.model)
    machine = _machine()
    if args.json:
        write_text(json.dumps(_facts(found, tokenizer, machine), indent=1), args.json)
    if args.json != "-":
        for name, value in _lines(found, tokenizer, machine):
            print(f"{name:<12} {value}")
    return 0


def _tokenizer(source: str) -> str | None:
    from moe_tools.model.checkpoint import load_tokenizer

    try:
        return type(load_tokenizer(source)).__name__
    except ValueError:
        return None


def _machine() -> dict[str, Any]:
    import torch
    import transformers

    from moe_tools.cli.common import pick_dtype
    from moe_tools.measure.bench_kernels import backends

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
        "kernels": backends(),
    }


def _facts(found: Diagnosis, tokenizer: str | None, machine: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    shares = {
        "ffn_parameter_share": found.ffn_parameter_share,
        "ffn_flop_share": found.ffn_flop_share,
    }
    return {**asdict(found), **shares, "tokenizer": tokenizer, "machine": machine}


def _lines(
    found: Diagnosis, tokenizer: str | None, machine: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    yield "model", f"{found.host}, {found.parameters / 1e6:.1f}M parameters, {found.dtype}"
    for shape in found.shapes:
        kind = "gated " if shape.gated else ""
        sizes = ", ".join(map(str, shape.expert_sizes)) or "4 to 64 make experts of two sizes"
        yield "FFNs", f"{shape.count} x {kind}{shape.activation}, D={shape.width} F={shape.neurons}"
        yield "expert size", sizes
    share, flops = found.ffn_parameter_share, found.ffn_flop_share
    yield "in the FFNs", f"{share:.0%} of the parameters, {flops:.0%} of the FLOPs of a short text"
    yield "converted", _conversion(found)
    yield "tokenizer", tokenizer or "none: it cannot be trained or evaluated from this folder"
    yield "software", f"torch {machine['torch']}, transformers {machine['transformers']}"
    for device, dtype in machine["auto_dtype"].items():
        yield "device", f"{device}, {dtype} by default"
    yield "kernels", ", ".join(machine["kernels"])


def _conversion(found: Diagnosis) -> str:
    made = found.conversion
    if made is None:
        return "no"
    if made.router is None:
        return f"split into experts of {made.expert_size} neurons, no router yet"
    selector = ", ".join(f"{key} {value}" for key, value in (made.selector or {}).items())
    return (
        f"experts of {made.expert_size} neurons, router {made.router}, selector ({selector}), "
        f"mode {made.mode}; from {made.donor}"
    )
