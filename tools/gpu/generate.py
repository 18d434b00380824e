"""Stage d: tokens a second of whole models with random weights, dense and ours.

A llama of the shape of LLaMA-2-7B and, ours routed, one whose experts of 32 neurons are 90 % off;
and a host of the shape of Mixtral-8x7B, ours with dReLU experts. Decoding goes token by token
through a static cache: eager; compiled, one graph of `torch.compile` replayed as a CUDA graph; and
captured, the eager step as a CUDA graph.

Letters: B rows of a batch (one), T tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    StaticCache,
)

from moe_tools.bench.cuda import between_events, capture
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.swapped import swap_activations
from moe_tools.hosts import moe_kernels
from moe_tools.inference.moe_implementation import lay_out_experts, register_experts
from moe_tools.inference.optimized import optimize
from moe_tools.kernels.moe import moe_ffn
from tools.gpu.context import Context, Row, Skip
from tools.gpu.stages import first_line

PROMPTS = (512, 128)
"""Tokens of a prefill; decoding goes on behind the last."""
NEW = 64
"""Tokens that are decoded."""
ROUNDS = 3
WAYS = ("eager", "compiled", "captured")
ON = 0.1
"""Share of the experts that run."""
ALL_LAYERS, FEW_LAYERS, MIXTRAL_LAYERS, DRY_LAYERS = 32, 8, 4, 1
LONG = 200
"""Seconds with which all layers are taken: to compile them takes longest, for each model."""


@dataclass(frozen=True)
class Sizes:
    """What differs between a run and a dry run."""

    width: int
    neurons: int
    """Of the llama, and of one expert of the mixture."""
    expert: int
    heads: int
    vocabulary: int
    expert_size: int
    prompts: tuple[int, ...]
    new: int
    dtype: torch.dtype


FULL = Sizes(4096, 11008, 14336, 32, 32000, 32, PROMPTS, NEW, torch.bfloat16)
TINY = Sizes(32, 96, 64, 2, 64, 8, (5, 3), 2, torch.float32)


def run(context: Context) -> Iterator[Row]:
    """Yields a row for each model and way; a way that fails says why, and the next goes on."""
    for host, build in context.within([("llama", _llamas), ("mixtral", _mixtrals)]):
        try:
            for row, model in build(context):
                for way in context.within(WAYS[:2] if context.dry else WAYS):
                    yield {"host": host, **row, "way": way} | _measure(context, model, way)
        except Skip as reason:
            yield {"host": host, "skipped": str(reason)}
        except torch.OutOfMemoryError:
            yield {"host": host, "skipped": "too little memory"}
        model = None  # before the next one is built
        if not context.dry:
            torch.cuda.empty_cache()


def _llamas(context: Context) -> Iterator[tuple[Row, Any]]:
    """Yields a dense llama, then itself, routed and optimised."""
    sizes = TINY if context.dry else FULL
    most = ALL_LAYERS if context.left > LONG else FEW_LAYERS
    layers = DRY_LAYERS if context.dry else most
    of = {"layers": f"{layers} of {ALL_LAYERS}"}
    config = LlamaConfig(**sizes_of(sizes, layers), intermediate_size=sizes.neurons)
    each = 4 * sizes.width**2 + 3 * sizes.width * sizes.neurons
    # The FFNs are packed one by one, beside the others.
    context.need(2.4 * layers * each * sizes.dtype.itemsize, f"a llama of {layers} layers")
    model = _random(LlamaForCausalLM, config, sizes, context.device)
    yield of | {"model": "dense"}, model
    route(model, sizes)
    # On a CPU the native kernels would be taken.
    optimize(model, backend="triton" if context.dry else "auto")
    backends = {ffn.packed.backend for ffn in expert_ffns(model) if ffn.packed is not None}
    name = f"{1 - ON:.0%} off, by {' and '.join(sorted(backends)) or 'PyTorch'}"
    yield of | {"model": name}, model


def route(model: Any, sizes: Sizes) -> None:
    """Gives each FFN a router that lets `ON` of its experts through, others for each token.

    Inputs of an FFN have a mean square of one, so logits of weights of 1/sqrt(D) are normal.
    """
    spec = {"kind": "threshold", "tau": 0.5}
    conversion = Conversion("gpu", expert_size=sizes.expert_size, router="sigmoid", selector=spec)
    for ffn in attach_experts(model, conversion):
        torch.nn.init.normal_(ffn.router.get_parameter("weight"), std=sizes.width**-0.5)
        bias = float(torch.special.ndtri(torch.tensor(ON)))
        torch.nn.init.constant_(ffn.router.get_parameter("bias"), bias)
    model.eval()


def _mixtrals(context: Context) -> Iterator[tuple[Row, Any]]:
    """Yields a stock mixture, then itself with dReLU experts through our kernels."""
    sizes = TINY if context.dry else FULL
    layers = DRY_LAYERS if context.dry else MIXTRAL_LAYERS
    of = {"layers": f"{layers} of {ALL_LAYERS}"}
    config = MixtralConfig(
        **sizes_of(sizes, layers),
        intermediate_size=sizes.expert,
        num_key_value_heads=max(1, sizes.heads // 4),
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    each = 24 * sizes.width * sizes.expert * sizes.dtype.itemsize
    context.need(1.3 * layers * each, f"a mixture of {layers} layers")
    model = _random(MixtralForCausalLM, config, sizes, context.device)
    yield of | {"model": f"stock ({model.config._experts_implementation})"}, model
    swap_activations(model, Conversion("gpu", activation={"kind": "drelu"}))
    register_experts()
    model.set_experts_implementation("moe_tools")
    lay_out_experts(model)
    # On a CPU the reference would be taken.
    kernels = patch.object(moe_kernels, "moe_ffn", partial(moe_ffn, backend="triton"))
    with kernels if context.dry else nullcontext():
        yield of | {"model": "dReLU, moe_tools"}, model


def sizes_of(sizes: Sizes, layers: int) -> dict[str, Any]:
    """What the configs of all hosts here say."""
    return {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": layers,
        "num_attention_heads": sizes.heads,
        "pad_token_id": 0,
    }


def _random(kind: Any, config: Any, sizes: Sizes, device: str) -> Any:
    """A model whose weights are drawn where it stands."""
    torch.manual_seed(0)
    with torch.device(device):
        return kind._from_config(config, dtype=sizes.dtype).eval()


@torch.no_grad()
def _measure(context: Context, model: Any, way: str) -> Row:
    """Times one way; where a compiler refuses, or a graph is not captured, the row says why."""
    sizes = TINY if context.dry else FULL
    if way == "eager":
        return _prefills(context, model, sizes) | _decoding(context, model, _Eager, sizes)
    counters["inductor"].clear()
    try:
        row = _decoding(context, model, _Compiled if way == "compiled" else _Captured, sizes)
        skips = counters["inductor"]["cudagraph_skips"]
        return row | (
            {"refused": f"{skips} graphs were not replayed as CUDA graphs"} if skips else {}
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler throws
        return {"refused": first_line(error)}


def _prefills(context: Context, model: Any, sizes: Sizes) -> Row:
    """Tokens a second of each prompt, without a cache."""
    made: Row = {}
    for tokens in sizes.prompts:
        ids_BT = torch.randint(sizes.vocabulary, (1, tokens), device=context.device)
        call = partial(model, ids_BT, use_cache=False, logits_to_keep=1)
        times = [_seconds(context, call) for _ in range(1 + ROUNDS)]
        if not context.dry:
            made[f"prefill {tokens}"] = tokens / statistics.median(times[1:])
    return made


class _Eager:
    """Decodes on and on; a token goes where the last one was, as a CUDA graph wants it."""

    def __init__(self, model: Any, cache: Any, ids_B1: Tensor) -> None:
        self.step, self.cache, self.ids_B1 = model, cache, ids_B1

    def __call__(self) -> None:
        """Decodes one token."""
        logits_B1V = self.step(self.ids_B1, past_key_values=self.cache).logits
        self.ids_B1.copy_(logits_B1V[:, -1].argmax(-1, keepdim=True))


class _Compiled(_Eager):
    def __init__(self, model: Any, cache: Any, ids_B1: Tensor) -> None:
        torch._dynamo.reset()
        # The compiler of a dry run only traces: that the step is one graph is what can be seen.
        dry = ids_B1.device.type == "cpu"
        options: Any = {"backend": "aot_eager"} if dry else {"mode": "reduce-overhead"}
        super().__init__(torch.compile(model, fullgraph=True, **options), cache, ids_B1)

    def __call__(self) -> None:
        """Decodes one token; the outputs of the step before may be overwritten."""
        torch.compiler.cudagraph_mark_step_begin()
        super().__call__()


class _Captured(_Eager):
    def __init__(self, model: Any, cache: Any, ids_B1: Tensor) -> None:
        super().__init__(model, cache, ids_B1)
        self.graph = capture([super().__call__])

    def __call__(self) -> None:
        """Decodes one token."""
        self.graph.replay()


def _decoding(context: Context, model: Any, way: type[_Eager], sizes: Sizes) -> Row:
    """New tokens a second behind the last prompt; the first round compiles and does not count."""
    rounds, prompt = 1 + (1 if context.dry else ROUNDS), sizes.prompts[-1]
    # One token more is decoded before a graph is captured.
    cache = StaticCache(config=model.config, max_cache_len=prompt + rounds * sizes.new + 1)
    ids_BT = torch.randint(sizes.vocabulary, (1, prompt), device=context.device)
    model(ids_BT, past_key_values=cache, logits_to_keep=1)
    step = way(model, cache, ids_BT[:, -1:].clone())

    def decode() -> None:
        for _ in range(sizes.new):
            step()

    times = [_seconds(context, decode) for _ in range(rounds)]
    return {} if context.dry else {"decode": sizes.new / statistics.median(times[1:])}


def _seconds(context: Context, call: Any) -> float:
    """How long the device takes; 0 in a dry run."""
    if context.dry:
        call()
        return 0.0
    start, stop = between_events(call)
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3
