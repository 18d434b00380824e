"""Tokens a second of whole models: dense and routed, each with and without the native kernels.

All models continue the same random prompt in one interleaved run, each with an ordinary
`generate`: its first token ends the prefill, the others are decoded one by one. Other programs
(`Rival`) take their turns in the same rounds. The dense row that decodes fastest, whoever computes
it, is the bar: what a sparse model has to beat.

Letters: B sequences that go on together, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from moe_tools.bench.ffn import widths
from moe_tools.bench.read_rate import read_rate
from moe_tools.bench.rounds import in_turn, median_ratio
from moe_tools.bench.token_bytes import is_dense, token_bytes
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.data.limits import context_length, continues_text, text_config
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.ffn import find_ffns
from moe_tools.hosts.zeros import gives_zeros
from moe_tools.inference.optimized import optimize
from moe_tools.inference.packed_linear import Kind, can_pack, pack_linears
from moe_tools.measure.flops import FlopCounter, count_flops
from moe_tools.measure.neurons import NeuronCount, count_neurons

LAYERS, VOCABULARY, HEAD = 10, 32000, 64
"""Sizes of the model that a shape makes; HEAD is the width of a head, where it divides D."""
ON = 0.1
"""Share of its experts that run for each token."""

Models = dict[str, PreTrainedModel]
Seconds = tuple[float, float]
"""Of the prompt, and of the tokens that are decoded after the first."""


@dataclass(frozen=True)
class Rival:
    """The dense model as another program runs it."""

    name: str
    token_bytes: float
    """Bytes of weights that a decoded token reads."""
    seconds: Callable[[Tensor, int], Seconds]
    """Takes ids_BT of a prompt, and the number of tokens to decode after the first."""


@dataclass(frozen=True)
class GenerateTiming:
    """One model: medians over the rounds."""

    model: str
    """dense, routed (every neuron is computed, then masked), optimised, or a rival's name."""
    sparsity: float
    """Share of FFN neurons off, or exactly 0, over the prompt and its continuation."""
    dense: bool
    """Whether it computes every neuron for every token."""
    prefill: float
    """Tokens of the prompt a second."""
    decode: float
    """New tokens a second."""
    prefill_speedup: float
    decode_speedup: float
    """Medians of this model over the dense one, round by round."""
    bytes_per_token: float
    """Weights that a decoded token of one sequence alone reads, as they are stored, with the
    neurons that `sparsity` leaves; not the KV cache."""
    gigabytes_per_second: float
    """Those bytes times `decode`: of several sequences together no rate, as they share reads."""
    read_rate: float
    """What the memory gives while a large tensor is summed up, in the same unit; of the run."""
    share_of_read_rate: float
    bar: str
    """The dense model that decodes fastest; of the run."""
    over_bar: float
    """Median of decoding by this model over the bar, round by round."""


def folder_models(folder: str, dtype: torch.dtype) -> Models:
    """Loads a converted folder as a dense model, as it is, and both optimised.

    A folder without routers has two: as it is, which is dense, and optimised. Where no linear can
    be packed, the dense model is left out that would be optimised by nothing else.

    Raises:
        ValueError: what `load` and `optimize` refuse, or a model that continues no text.
    """
    dense, plain = load(folder, dtype=dtype, routed=False), load(folder, dtype=dtype)
    if not continues_text(plain):
        raise ValueError(f"{type(plain).__name__} continues no text: time a causal model")
    return _models(dense, plain if expert_ffns(plain) else None)


def shape_models(shape: str, expert_size: int, dtype: torch.dtype) -> Models:
    """Makes these models of a random llama of 10 layers; a tenth of its experts run.

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


def add_quantized(models: Models, packed: torch.dtype | None, linears: Kind | None) -> str:
    """Adds one more model: its FFNs packed as `packed`, its other linears as `linears`.

    With `linears` it adds the dense model of such linears as well, the FFNs' own among them.

    Returns:
        The name of the first of the two.

    Raises:
        ValueError: what `optimize` refuses.
    """
    name = str(packed or "optimised").removeprefix("torch.")
    name = f"{name}, linears {linears}" if linears else name
    made = optimize(_twin(models.get("routed", models["dense"])), dtype=packed, linears=linears)
    if linears and not is_dense(made):
        few = _twin(models["dense"])
        if _skips(few):
            pack_linears(few, linears)
        else:
            optimize(few, linears=linears)
        models[f"dense, linears {linears}"] = few
    models[name] = made
    return name


def bench_generate(
    models: Models,
    *,
    prompt: int | Tensor = 128,
    tokens: int = 64,
    sequences: int = 1,
    rounds: int = 5,
    packed: Mapping[str, torch.dtype] | None = None,
    rivals: Sequence[Rival] = (),
) -> list[GenerateTiming]:
    """Times models of one host; the first is the dense one, which others are compared with.

    Args:
        models: by name, as `folder_models` and `shape_models` make them.
        prompt: tokens of a random prompt; or the prompts themselves, ids_BT, whose routing is that
            of text.
        tokens: that are decoded, one by one, after the first.
        sequences: B, of random prompts, that go on together; tokens a second are those of all.
        rounds: that count; one before them does not.
        packed: name -> what its FFNs are packed as, where that is not its own dtype.
        rivals: other programs, which take their turns in the same rounds.

    Raises:
        ValueError: more tokens than the context has, or a rival that fails.
    """
    first = next(iter(models.values()))
    ids_BT = prompt if isinstance(prompt, Tensor) else _random_BT(first, sequences, prompt)
    sequences, length = ids_BT.shape
    context = context_length(first)
    if context is not None and length + tokens + 1 > context:
        raise ValueError(
            f"a prompt of {length} tokens and {tokens + 1} new ones exceed the context of {context}"
        )
    if rivals and sequences > 1:
        raise ValueError(f"other programs are timed with one sequence, not {sequences}")
    with quiet_transformers():
        rows = _rows(models, ids_BT, tokens, packed or {})
        calls = [partial(_seconds, model, ids_BT, tokens) for model in models.values()]
        for rival in rivals:
            rows.append(_Row(rival.name, True, 0.0, rival.token_bytes))
            calls.append(partial(rival.seconds, ids_BT, tokens))
        rate = read_rate("cpu")
        found = in_turn(calls, rounds, warm_up=1)
        rate = max(rate, read_rate("cpu"))
    return _timings(rows, found, (length * sequences, tokens * sequences), rate)


def _random_BT(model: PreTrainedModel, sequences: int, length: int) -> Tensor:
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(text_config(model).vocab_size, (sequences, length), generator=drawn)


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
    bar = (
        {} if _skips(dense) or not can_pack(dense) else {"dense, optimised": optimize(_twin(dense))}
    )
    if routed is None:
        return {"dense": dense, **(bar or {"optimised": optimize(_twin(dense))})}
    return {"dense": dense, **bar, "routed": routed, "optimised": optimize(_twin(routed))}


def _skips(dense: PreTrainedModel) -> bool:
    """Whether the kernels would skip neurons, so that the model is dense no more."""
    return any(gives_zeros(ffn.act) for ffn in find_ffns(dense))


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copies the modules, but not the parameters."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@dataclass(frozen=True)
class _Row:
    """What is known of a row before it is timed; the fields are those of `GenerateTiming`."""

    model: str
    dense: bool
    sparsity: float
    bytes_per_token: float


def _rows(
    models: Models, ids_BT: Tensor, tokens: int, packed: Mapping[str, torch.dtype]
) -> list[_Row]:
    """Counts what each model computes and reads, in a run of its own or of its unpacked twin."""
    first = next(iter(models.values()))
    counted: dict[int, tuple[list[NeuronCount], FlopCounter]] = {}
    rows = []
    for name, model in models.items():
        seen = models.get("routed", model if expert_ffns(model) else first)
        if id(seen) not in counted:
            counted[id(seen)] = _count(seen, ids_BT, tokens)
        counts, others = counted[id(seen)]
        size = token_bytes(
            model, counts, others, tokens=ids_BT.shape[1] + tokens, packed=packed.get(name)
        )
        off = 0.0 if is_dense(model) else _share_off(counts)
        rows.append(_Row(name, is_dense(model), off, size))
    return rows


def _count(
    model: PreTrainedModel, ids_BT: Tensor, tokens: int
) -> tuple[list[NeuronCount], FlopCounter]:
    with count_neurons(model) as counts, count_flops(model) as others:
        _seconds(model, ids_BT, tokens)
    return counts, others


def _share_off(counts: Sequence[NeuronCount]) -> float:
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


def _seconds(model: PreTrainedModel, ids_BT: Tensor, tokens: int) -> Seconds:
    """Times the prefill with its first token, and the `tokens` after it, in seconds."""
    clock, new = _Clock(), tokens + 1
    host: Any = model  # transformers gives `generate` a type that no model has
    began = time.perf_counter()
    host.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        streamer=clock,
        max_new_tokens=new,
        # No word ends the text. `min_new_tokens` would go through all words for every token.
        eos_token_id=model.get_input_embeddings().num_embeddings,
        pad_token_id=0,
        do_sample=False,
    )
    first, last = clock.moments[1], clock.moments[-1]
    return first - began, last - first


def _timings(
    rows: Sequence[_Row],
    found: Sequence[Sequence[Seconds]],
    counts: tuple[int, int],
    rate: float,
) -> list[GenerateTiming]:
    """Puts the rounds together.

    Args:
        rows: of which the first is what prefill and decoding are compared with.
        found: of each row, every round.
        counts: tokens of all prompts, and decoded ones.
        rate: bytes a second that the memory gives.
    """
    phases = [tuple(zip(*own, strict=True)) for own in found]
    dense = [index for index, row in enumerate(rows) if row.dense] or [0]
    bar = min(dense, key=lambda index: statistics.median(phases[index][1]))
    timings = []
    for row, (prefill, decode) in zip(rows, phases, strict=True):
        speed = counts[1] / statistics.median(decode)
        timing = GenerateTiming(
            **asdict(row),
            prefill=counts[0] / statistics.median(prefill),
            decode=speed,
            prefill_speedup=median_ratio(phases[0][0], prefill),
            decode_speedup=median_ratio(phases[0][1], decode),
            gigabytes_per_second=row.bytes_per_token * speed / 1e9,
            read_rate=rate / 1e9,
            share_of_read_rate=row.bytes_per_token * speed / rate,
            bar=rows[bar].model,
            over_bar=median_ratio(phases[bar][1], decode),
        )
        timings.append(timing)
    return timings
