"""Tokens a second of whole models: dense, routed, and routed through the sparse kernels.

All models continue the same random prompt in one interleaved run, each with an ordinary
`generate`: its first token ends the prefill, the others are decoded one by one.

Letters: B rows of a batch, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from moe_tools.bench.ffn import widths
from moe_tools.bench.rounds import in_turn, median_ratio
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.data.limits import context_length, continues_text, text_config
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.inference.optimized import optimize
from moe_tools.inference.packed_linear import Kind
from moe_tools.measure.neurons import count_neurons

LAYERS, VOCABULARY, HEAD = 10, 32000, 64
"""Sizes of the model that a shape makes; HEAD is the width of a head, where it divides D."""
ON = 0.1
"""Share of its experts that run for each token."""

Models = dict[str, PreTrainedModel]


@dataclass(frozen=True)
class GenerateTiming:
    """One model: medians over the rounds."""

    model: str
    """dense, routed (every neuron is computed, then masked) or optimised."""
    sparsity: float
    """Share of FFN neurons off, or exactly 0, over the prompt and its continuation."""
    prefill: float
    """Tokens of the prompt a second."""
    decode: float
    """New tokens a second."""
    prefill_speedup: float
    decode_speedup: float
    """Medians of this model over the dense one, round by round."""


def folder_models(folder: str, dtype: torch.dtype) -> Models:
    """Loads a converted folder as a dense model, as it is, and optimised.

    A folder without routers has two: as it is, which is dense, and optimised.

    Raises:
        ValueError: what `load` and `optimize` refuse, or a model that continues no text.
    """
    dense, plain = load(folder, dtype=dtype, routed=False), load(folder, dtype=dtype)
    if not continues_text(plain):
        raise ValueError(f"{type(plain).__name__} continues no text: time a causal model")
    return _models(dense, plain if expert_ffns(plain) else None)


def shape_models(shape: str, expert_size: int, dtype: torch.dtype) -> Models:
    """Makes these three models of a random llama of 10 layers; a tenth of its experts run.

    Raises:
        ValueError: an unknown shape, or an expert size that exceeds its neurons.
    """
    width, neurons = widths(shape)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=LAYERS,
        num_attention_heads=1 if width % HEAD else width // HEAD,
        pad_token_id=0,
    )
    dense: Any = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    routed = _twin(dense)
    spec = {"kind": "topk", "share": ON}
    attach_experts(routed, Conversion("bench", expert_size, "sigmoid", spec))
    return _models(dense, routed)


def add_quantized(models: Models, packed: torch.dtype | None, linears: Kind | None) -> None:
    """Adds one more model: its FFNs packed as `packed`, its other linears as `linears`.

    Raises:
        ValueError: what `optimize` refuses.
    """
    name = str(packed or "optimised").removeprefix("torch.")
    made = optimize(_twin(models.get("routed", models["dense"])), dtype=packed, linears=linears)
    models[f"{name}, linears {linears}" if linears else name] = made


def bench_generate(
    models: Models, *, prompt: int = 128, tokens: int = 64, rounds: int = 5
) -> list[GenerateTiming]:
    """Times models of one host; the first is what the others are compared with.

    Args:
        models: by name, as `folder_models` and `shape_models` make them.
        prompt: tokens of the prompt.
        tokens: that are decoded, one by one, after the first.
        rounds: that count; one before them does not.

    Raises:
        ValueError: more tokens than the context has.
    """
    first = next(iter(models.values()))
    context = context_length(first)
    if context is not None and prompt + tokens + 1 > context:
        raise ValueError(
            f"a prompt of {prompt} tokens and {tokens + 1} new ones exceed the context of {context}"
        )
    drawn = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(text_config(first).vocab_size, (1, prompt), generator=drawn)
    seen = models.get("routed", first)
    with quiet_transformers():
        sparsity = _share_off(seen, ids_BT, tokens)
        calls = [partial(_seconds, model, ids_BT, tokens) for model in models.values()]
        found = in_turn(calls, rounds, warm_up=1)
    return [
        _timing(name, own, found[0], (prompt, tokens), 0.0 if model is first else sparsity)
        for (name, model), own in zip(models.items(), found, strict=True)
    ]


@contextmanager
def threads(number: int | None) -> Iterator[int]:
    """Lets PyTorch and the kernels use that many threads for a while; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _models(dense: PreTrainedModel, routed: PreTrainedModel | None) -> Models:
    fast = optimize(_twin(routed or dense))
    middle = {} if routed is None else {"routed": routed}
    return {"dense": dense, **middle, "optimised": fast}


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copies the modules, but not the parameters."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _share_off(model: PreTrainedModel, ids_BT: Tensor, tokens: int) -> float:
    with count_neurons(model) as counts:
        _seconds(model, ids_BT, tokens)
    return 1 - sum(count.working for count in counts) / sum(count.seen for count in counts)


class _Clock(BaseStreamer):
    """Notes the moments at which `generate` hands out the prompt and each token."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Tensor) -> None:
        """Notes the moment of a token."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing: there is nothing left to print."""


def _seconds(model: PreTrainedModel, ids_BT: Tensor, tokens: int) -> tuple[float, float]:
    """Times the prefill with its first token, and the `tokens` after it, in seconds."""
    clock, new = _Clock(), tokens + 1
    host: Any = model  # transformers gives `generate` a type that no model has
    began = time.perf_counter()
    host.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        streamer=clock,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
    )
    first, last = clock.moments[1], clock.moments[-1]
    return first - began, last - first


def _timing(
    name: str,
    own: list[tuple[float, float]],
    base: list[tuple[float, float]],
    counts: tuple[int, int],
    sparsity: float,
) -> GenerateTiming:
    prefill, decode = (list(phase) for phase in zip(*own, strict=True))
    slow_prefill, slow_decode = (list(phase) for phase in zip(*base, strict=True))
    return GenerateTiming(
        model=name,
        sparsity=sparsity,
        prefill=counts[0] / statistics.median(prefill),
        decode=counts[1] / statistics.median(decode),
        prefill_speedup=median_ratio(slow_prefill, prefill),
        decode_speedup=median_ratio(slow_decode, decode),
    )
