"""`moe-tools generate`: a model continues a prompt."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from moe_tools.cli.options import add_model_options, not_negative, positive

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUMMARY = "continue a prompt and say how sparse that was"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("folder", help="converted or dense model")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--chat", action="store_true", help="wrap it in the chat template")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="default: 64")
    parser.add_argument("--temperature", type=not_negative, default=0.0, help="default: 0, greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
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
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Streams the text to standard output, then its figures to standard error."""
    if not args.prompt.strip():
        raise ValueError("--prompt is empty: give some text to continue")
    for option in ("packed_dtype", "linears", "screen"):
        if getattr(args, option) is not None and not args.optimize:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is of the sparse kernels: add --optimize")
    from moe_tools.checkpoint.loading import load, load_tokenizer
    from moe_tools.cli.common import PACKED, pick_dtype, quiet_transformers, use_device
    from moe_tools.inference.optimized import optimize
    from moe_tools.measure.neurons import count_neurons, sparsity

    device = use_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    with quiet_transformers():
        tokenizer = load_tokenizer(args.folder)
        model = load(args.folder, dtype=dtype, device=device)
        prompt = _encode(args, model, tokenizer)
        with count_neurons(model) as counts:
            if args.optimize:  # not before: a dense model that is optimised shows no FFNs
                packed = PACKED.get(args.packed_dtype)
                optimize(model, dtype=packed, screen=args.screen, linears=args.linears)
            began = time.perf_counter()
            tokens = _stream(args, model, tokenizer, prompt)
            seconds = time.perf_counter() - began
    off = f"FFN sparsity {sparsity(counts):.1%}" if counts[0].routed else "dense"
    kind = f"{str(dtype).removeprefix('torch.')} on {device}"
    figures = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s ({kind})"
    print(f"{figures}; {off}, prompt included", file=sys.stderr)
    return 0


def _encode(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """The prompt's tokens, checked against what the model can continue."""
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} predicts masked tokens and continues no text")
    text = args.prompt
    if args.chat:
        if not tokenizer.chat_template:
            raise ValueError(f"{args.folder} has no chat template: leave --chat out")
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=not args.chat, verbose=False)
    length = encoded["input_ids"].shape[1]
    context = getattr(model.config, "max_position_embeddings", None)
    if length == 0:
        raise ValueError(
            f"--prompt {args.prompt!r} has no token for this tokenizer: give more text"
        )
    if context is not None and length + args.max_new_tokens > context:
        raise ValueError(
            f"a prompt of {length} tokens and {args.max_new_tokens} new ones exceed the context of "
            f"{context} tokens: shorten the prompt or --max-new-tokens"
        )
    return {key: encoded[key].to(model.device) for key in ("input_ids", "attention_mask")}


def _stream(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: dict[str, Tensor],
) -> int:
    """Generates and prints as it goes; how many tokens that were."""
    import torch
    from transformers import TextStreamer

    host: Any = model  # transformers gives `generate` a type that no model has
    torch.manual_seed(args.seed)
    ids_BT = host.generate(
        **prompt,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        temperature=args.temperature or None,
        use_cache=True,
    )
    given = 1 if model.config.is_encoder_decoder else prompt["input_ids"].shape[1]
    return int(ids_BT.shape[1]) - given
