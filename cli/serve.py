"""`moe-tools serve`: OpenAI's HTTP interface to a model."""

from __future__ import annotations

import argparse
import os

from moe_tools.cli.options import (
    add_model_options,
    add_packing_options,
    check_packing_options,
    not_negative,
    positive,
    zero_or_more,
)
from moe_tools.extras import needed

SUMMARY = "answer requests of OpenAI's HTTP interface with a model"
KEY = "MOE_TOOLS_API_KEY"
PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client")
"""What the extra `serve` brings."""
OURS = {
    "optimize": "--optimize",
    "packed_dtype": "--packed-dtype",
    "linears": "--linears",
    "screen": "--screen",
    "batching": "--batching",
    "sparsity_every": "--sparsity-every",
    "max_waiting": "--max-waiting",
    "max_body": "--max-body",
    "grace": "--grace",
}
"""Options of the engine transformers alone, by their names in the arguments."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("folder", help="converted or dense model")
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="default: transformers; vllm takes its own options behind --",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone"
    )
    parser.add_argument("--port", type=zero_or_more, default=8000, help="default: 8000; 0: any")
    parser.add_argument("--name", help="of the model, for clients; default: the folder's")
    parser.add_argument(
        "--api-key",
        help=f"that clients have to send; better said in {KEY}, which nobody else reads",
    )
    parser.add_argument("--max-concurrency", type=positive, help="requests at once; default: 8")
    _add_own(parser)
    add_model_options(parser)


def _add_own(parser: argparse.ArgumentParser) -> None:
    """Adds what the engine transformers has; no defaults here, to see what was said."""
    parser.add_argument(
        "--max-waiting", type=zero_or_more, help="more wait, or get 429; default: 64"
    )
    parser.add_argument("--max-body", type=positive, help="bytes of a request; default: 4 MiB")
    parser.add_argument(
        "--grace", type=not_negative, help="seconds for what runs at SIGTERM; default: 30"
    )
    add_packing_options(parser)
    parser.add_argument(
        "--batching",
        choices=("auto", "on", "off"),
        help="compute requests together; default: auto, wherever that gives the same text",
    )
    parser.add_argument(
        "--sparsity-every",
        type=zero_or_more,
        metavar="N",
        help="count neurons in one pass of N, 0: in none; default: 1, with --optimize 16",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until a signal."""
    key = os.environ.get(KEY) if args.api_key is None else args.api_key
    if key is not None and not key.strip():
        raise ValueError("the API key is empty: give some letters, or none at all")
    if args.engine == "vllm":
        _vllm(args, key)
    else:
        _transformers(args, key)
    return 0


def _vllm(args: argparse.Namespace, key: str | None) -> None:
    from moe_tools.checkpoint.remote_code import is_trusted
    from moe_tools.serving.vllm_engine import VllmSettings, become

    for name, option in OURS.items():
        said = getattr(args, name)
        if said is not None and said is not False:
            raise ValueError(f"{option} is of the engine transformers: leave it out with vllm")
    if args.device != "auto":
        raise ValueError("--device is of the engine transformers: vllm takes what it was built for")
    settings = VllmSettings(
        args.folder,
        args.host,
        args.port,
        name=args.name,
        dtype=args.dtype,
        slots=args.max_concurrency,
        trust_remote_code=is_trusted(),
        more=tuple(args.behind),
    )
    become(settings, key)


def _transformers(args: argparse.Namespace, key: str | None) -> None:
    if args.behind:
        raise ValueError(f"{args.behind[0]} stands behind --, which is for the engine vllm")
    check_packing_options(args)
    for package in PACKAGES:
        needed(package, "serve", "moe-tools serve")
    from moe_tools.cli.common import PACKED, pick_dtype, use_device
    from moe_tools.serving.app import Limits
    from moe_tools.serving.hosted import Packing
    from moe_tools.serving.serve import Settings, serve

    device = use_device(args.device)
    packed = PACKED[args.packed_dtype] if args.packed_dtype else None
    limits = {"waiting": args.max_waiting, "body": args.max_body, "key": key}
    said = {"slots": args.max_concurrency, "batching": args.batching, "grace": args.grace}
    serve(
        Settings(
            args.folder,
            pick_dtype(args.dtype, device),
            device,
            name=args.name,
            packing=Packing(packed, args.linears, args.screen) if args.optimize else None,
            host=args.host,
            port=args.port,
            every=args.sparsity_every,
            limits=Limits(**{k: v for k, v in limits.items() if v is not None}),
            **{k: v for k, v in said.items() if v is not None},
        )
    )
