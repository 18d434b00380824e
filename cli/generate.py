"""`moe-tools generate`: a model continues a prompt."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from moe_tools.cli.options import (
    add_model_options,
    add_packing_options,
    check_packing_options,
    not_negative,
    positive,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_tools.inference.packed_linear import Kind
    from moe_tools.inference.prompt_ffn import PromptFFN

NOT_PACKED = (
    "after the prompt a smaller dense FFN runs, which --optimize does not pack: leave --optimize "
    "out, or the selection by the prompt"
)
SUMMARY = "continue a prompt and say how sparse that was"


@dataclass(frozen=True)
class Request:
    """What `generate` is asked for; each field is the option of that name."""

    folder: str
    prompt: str
    chat: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    optimize: bool = False
    packed_dtype: str | None = None
    linears: Kind | None = None
    screen: float | None = None
    select: Literal["prompt"] | None = None
    share: float | None = None
    dtype: str = "auto"
    device: str = "auto"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this verb's options."""
    parser.add_argument("folder", help="converted or dense model")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--chat", action="store_true", help="wrap it in the chat template")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="default: 64")
    parser.add_argument("--temperature", type=not_negative, default=0.0, help="default: 0, greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    add_packing_options(parser)
    parser.add_argument(
        "--select",
        choices=("prompt",),
        help="of a dense model: after the prompt, only the neurons that mattered there run "
        "(GRIFFIN)",
    )
    parser.add_argument(
        "--share", type=float, metavar="S", help="of the neurons, with --select; default: 0.5"
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Checks the options that need another one, and generates."""
    if not args.prompt.strip():
        raise ValueError("--prompt is empty: give some text to continue")
    check_packing_options(args)
    if args.share is not None and args.select is None:
        raise ValueError("--share is of the neurons that a prompt selects: add --select prompt")
    if args.select is not None and args.optimize:
        raise ValueError(NOT_PACKED)
    generate(Request(**vars(args)))
    return 0


def generate(request: Request) -> None:
    """Streams the text to standard output, then its figures to standard error.

    Raises:
        ValueError: a model that cannot be loaded, optimised or continue this prompt, or whose
            neurons the prompt cannot select.
    """
    from moe_tools.checkpoint.loading import load, load_tokenizer, prompt_share
    from moe_tools.cli.common import pick_dtype, quiet_transformers, use_device

    device = use_device(request.device)
    dtype = pick_dtype(request.dtype, device)
    with quiet_transformers():
        tokenizer = load_tokenizer(request.folder)
        anew = request.select is not None and prompt_share(request.folder) is not None
        model = load(request.folder, dtype=dtype, device=device, routed=not anew)
        prompt = _encode(request, model, tokenizer)
        _check_ends(request.folder, model)
        with _counted(request, model) as share_off:
            began = time.perf_counter()
            tokens = _stream(request, model, tokenizer, prompt)
            seconds = time.perf_counter() - began
            off = share_off()
    kind = f"{str(dtype).removeprefix('torch.')} on {device}"
    figures = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s ({kind})"
    print(f"{figures}; {off}", file=sys.stderr)


@contextmanager
def _counted(request: Request, model: PreTrainedModel) -> Iterator[Callable[[], str]]:
    """Lets a model run as is asked for; yields what says how many neurons did, in words."""
    from moe_tools.cli.common import PACKED
    from moe_tools.inference.optimized import optimize
    from moe_tools.inference.prompt import select_by_prompt
    from moe_tools.inference.prompt_ffn import prompt_ffns
    from moe_tools.measure.neurons import count_neurons, sparsity

    if request.select is not None or prompt_ffns(model):
        if request.optimize:
            raise ValueError(NOT_PACKED)
        installed = nullcontext(prompt_ffns(model))
        share = 0.5 if request.share is None else request.share
        selected = select_by_prompt(model, share) if request.select else installed
        with selected as ffns:
            yield partial(_after_prompt, ffns)
        return
    with count_neurons(model) as counts:
        if request.optimize:  # not before: a dense model that is optimised shows no FFNs
            packed = PACKED[request.packed_dtype] if request.packed_dtype else None
            optimize(model, dtype=packed, screen=request.screen, linears=request.linears)
        yield (
            lambda: (
                f"FFN sparsity {sparsity(counts):.1%}, prompt included"
                if counts[0].routed
                else "dense, prompt included"
            )
        )


def _after_prompt(ffns: list[PromptFFN]) -> str:
    """Which share of the neurons ran after the prompt, in words."""
    could = sum(ffn.could for ffn in ffns)
    if not could:
        return "nothing was generated on the KV cache: every neuron ran"
    return f"{sum(ffn.ran for ffn in ffns) / could:.1%} of the neurons ran after the prompt"


def _encode(
    request: Request, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Returns the prompt's tokens, if the model can continue them."""
    from moe_tools.data.limits import context_length, continues_text

    if not continues_text(model):
        raise ValueError(f"{type(model).__name__} continues no text: generate with a causal model")
    text, special = _text(request, tokenizer), not request.chat
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=special, verbose=False)
    length, new = encoded["input_ids"].shape[1], request.max_new_tokens
    context = context_length(model)
    if length == 0:
        raise ValueError(
            f"--prompt {request.prompt!r} has no token for this tokenizer: give more text"
        )
    if context is not None and length + new > context:
        raise ValueError(
            f"a prompt of {length} tokens and {new} new ones exceed the context of {context} "
            "tokens: shorten the prompt or --max-new-tokens"
        )
    return {key: encoded[key].to(model.device) for key in ("input_ids", "attention_mask")}


def _check_ends(folder: str, model: PreTrainedModel) -> None:
    """Checks the tokens of `generation_config.json`, which may be anybody's."""
    from moe_tools.typed import fits

    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(model.generation_config, name, None)
        if not fits(token, int | list[int] | None):
            raise ValueError(
                f"{name} in generation_config.json of {folder} is {token!r}, and must be the "
                "number of a token, or a list of some"
            )


def _text(request: Request, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the prompt, in the chat template where that is asked for."""
    if not request.chat:
        return request.prompt
    if not tokenizer.chat_template:
        raise ValueError(f"{request.folder} has no chat template: leave --chat out")
    turns = [{"role": "user", "content": request.prompt}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program, and fails in ways of its own
        said = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the chat template of {request.folder} fails ({said}): leave --chat out"
        ) from error


def _stream(
    request: Request,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: dict[str, Tensor],
) -> int:
    """Prints tokens as they are generated, and returns their number."""
    import torch
    from transformers import TextStreamer

    host: Any = model  # transformers gives `generate` a type that no model has
    torch.manual_seed(request.seed)
    ids_BT = host.generate(
        **prompt,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        max_new_tokens=request.max_new_tokens,
        do_sample=request.temperature > 0,
        temperature=request.temperature or None,
        use_cache=True,
    )
    given = 1 if model.config.is_encoder_decoder else prompt["input_ids"].shape[1]
    return int(ids_BT.shape[1]) - given
