"""Runs a model under inspection. Letters: B blocks, T tokens of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.checkpoint.loading import load, load_tokenizer
from moe_tools.data.generate import evaluating
from moe_tools.data.limits import context_length
from moe_tools.data.progress import progress
from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.intervene import FFNName, ffn_name, routed_by_name
from moe_tools.hosts.inputs import run_layers
from moe_tools.inspection.inspection import Inspection
from moe_tools.inspection.watch import watch


def inspect(
    model: PreTrainedModel | str | Path,
    text: str | Sequence[str] | Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ffns: Sequence[FFNName] | None = None,
    keep: int = 512,
    top: int = 5,
    norms: bool = True,
    batch_size: int = 4,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Inspection:
    """Runs a text through a routed model and says what its routers decided.

    Outputs and model stay as they are. Memory does not grow with the text: decisions are
    aggregated as they come, and the first `keep` tokens are kept whole.

    Args:
        model: a routed model, or the folder of one.
        text: a text, several texts one after the other, or blocks_BT of tokens.
        tokenizer: the model's; a folder has its own. Blocks need none: tokens are then numbers.
        ffns: names or indices of the FFNs to look at; None: all.
        keep: tokens whose decisions are kept one by one: `Inspection.decisions`, `.scores`.
        top: tokens that are kept for every expert: `Inspection.responses`.
        norms: measure what each expert would add to the output, on or off, for the share of output
            mass that is captured. It computes every FFN densely a second time.
        batch_size: blocks of one forward pass; texts run one by one.
        dtype: of a folder's weights; None keeps theirs.
        device: where a folder's model runs.

    Raises:
        ValueError: a folder that is no model, a model without routers, an FFN that it does not
            have, a text without tokens or longer than the context, or no tokenizer for a text.
    """
    if not isinstance(model, PreTrainedModel):
        tokenizer = tokenizer or load_tokenizer(model)
        model = load(model, dtype=dtype, device=device)
    batches = list(_batches(model, text, tokenizer, batch_size))
    with (
        inspecting(
            model, tokenizer=tokenizer, ffns=ffns, keep=keep, top=top, norms=norms
        ) as inspection,
        evaluating(model),
        torch.no_grad(),
        progress("inspect", sum(batch.numel() for batch in batches), "token") as bar,
    ):
        for batch_BT in batches:
            run_layers(model, batch_BT)
            bar.update(batch_BT.numel())
    return inspection


@contextmanager
def inspecting(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ffns: Sequence[FFNName] | None = None,
    keep: int = 512,
    top: int = 5,
    norms: bool = True,
) -> Iterator[Inspection]:
    """While it lasts, everything that the model runs is inspected.

    `generate` with its KV cache, batches with padding, training: see `inspect` for arguments and
    errors. What an attention mask says is padding is left out; under beam search the text before a
    token may be that of another beam.
    """
    if not expert_ffns(model):
        raise ValueError(
            f"{type(model).__name__} has no router to inspect: convert it first; for the zeros of "
            "a dense model use `moe-tools doctor`"
        )
    known = routed_by_name(model)
    names = list(known) if ffns is None else [ffn_name(known, name) for name in ffns]
    chosen = {name: ffn for name, ffn in known.items() if name in set(names)}
    if not chosen:
        raise ValueError("ffns is empty: name an FFN, or leave it out")
    if keep < 0 or top < 0:
        raise ValueError(f"keep is {keep} and top is {top}, but both must be at least 0")
    inspection = Inspection(chosen, _stacks(model, chosen), tokenizer, keep=keep, top=top)
    with watch(model, chosen, see=inspection.see, begin=inspection.begin, norms=norms):
        yield inspection


def _stacks(model: PreTrainedModel, ffns: Mapping[str, ExpertFFN]) -> list[list[str]]:
    """Groups the FFNs by the stack of layers they are in: those of a group see the same tokens."""
    if not model.config.is_encoder_decoder:
        return [list(ffns)]
    inside = set(model.get_encoder().modules())
    encoder = [name for name, ffn in ffns.items() if ffn in inside]
    decoder = [name for name, ffn in ffns.items() if ffn not in inside]
    return [stack for stack in (encoder, decoder) if stack]


def _batches(
    model: PreTrainedModel,
    text: str | Sequence[str] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    batch_size: int,
) -> Iterator[Tensor]:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
    if isinstance(text, Tensor):
        if text.ndim != 2 or not text.numel():
            raise ValueError(f"blocks are {tuple(text.shape)}: inspection needs (blocks, tokens)")
        check_length(model, text.shape[1])
        yield from text.split(batch_size)
        return
    if tokenizer is None:
        raise ValueError("a text needs a tokenizer: pass tokenizer=, or the folder of the model")
    for one in [text] if isinstance(text, str) else text:
        yield encode(model, tokenizer, one)


def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of one text: ids_BT with B = 1.

    Raises:
        ValueError: a text without tokens, or longer than the context.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if not text.strip() or not ids:
        raise ValueError(f"the text {text!r} is empty: give some words")
    check_length(model, len(ids))
    return torch.tensor([ids])


def check_length(model: PreTrainedModel, length: int) -> None:
    """Checks that the model has positions for as many tokens.

    Raises:
        ValueError: it has not.
    """
    context = context_length(model)
    if context is not None and length > context:
        raise ValueError(
            f"a text of {length} tokens exceeds the context of {type(model).__name__}, {context} "
            "tokens: shorten it, or cut it into blocks"
        )
