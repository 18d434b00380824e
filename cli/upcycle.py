"""`moe-tools upcycle`: a dense model in, an MoE of the same function out."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from moe_tools.cli.options import not_negative, positive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY = "make a Mixtral of copies of a dense llama's or mistral's FFNs"

logger = logging.getLogger("moe_tools.upcycle")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("model", help="dense llama or mistral: folder, hub id or GGUF file")
    parser.add_argument("--output", required=True, help="new folder")
    parser.add_argument("--num-experts", type=positive, default=8, help="of a layer; default: 8")
    parser.add_argument("--top-k", type=positive, default=2, help="that a token passes; default: 2")
    parser.add_argument("--seed", type=int, default=0, help="of the routers and the noise")
    parser.add_argument(
        "--noise",
        type=not_negative,
        default=0.0,
        help="added to every expert, over the deviation of its weights; default: 0, exact copies",
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights; default: bf16"
    )


def run(args: argparse.Namespace) -> int:
    """Writes a stock Mixtral folder with the donor's tokenizer, if it has one."""
    from moe_tools.atomic import check_free
    from moe_tools.checkpoint.loading import load
    from moe_tools.checkpoint.saving import save
    from moe_tools.cli.common import DTYPES, quiet_transformers
    from moe_tools.hosts.upcycle import check_upcycling, upcycle

    check_free(args.output)
    check_upcycling(args.num_experts, args.top_k, args.noise)
    with quiet_transformers():
        donor = load(args.model, dtype=DTYPES[args.dtype])
        model = upcycle(
            donor,
            num_experts=args.num_experts,
            top_k=args.top_k,
            seed=args.seed,
            noise=args.noise,
        )
        del donor
        save(model, args.output, _tokenizer(args.model))
    size = f"{args.top_k} of {args.num_experts} experts a token"
    logger.info("%s: %s, %.1fM parameters", args.output, size, model.num_parameters() / 1e6)
    return 0


def _tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    from moe_tools.checkpoint.loading import load_tokenizer

    try:
        return load_tokenizer(source)
    except ValueError:
        return None
