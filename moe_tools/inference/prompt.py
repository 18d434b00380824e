"""Selection once a prompt: the neurons that mattered for the prompt run for all that follows it.

GRIFFIN (arXiv 2404.01365): no training, no calibration, no kernel; the weights stay as they are.

Letters: T tokens, F neurons of one FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moe_tools.data.limits import continues_text
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.hooks import hooked
from moe_tools.experts.tokens import ValidTokens, valid_tokens
from moe_tools.hosts.ffn import FFN, graft, unfused_ffns
from moe_tools.hosts.layouts import holder_of, join
from moe_tools.hosts.proof import settle
from moe_tools.hosts.restore import restored
from moe_tools.inference.prompt_ffn import (
    PromptFFN,
    energy_BF,
    places_of,
    prompt_ffns,
    top_share_BF,
)
from moe_tools.inference.prompt_passes import PromptPasses


@contextmanager
def select_by_prompt(model: PreTrainedModel, share: float = 0.5) -> Iterator[list[PromptFFN]]:
    """While it lasts, a dense model continues a prompt with the neurons that mattered for it.

    A pass with an empty KV cache, or with more than one new token a sequence, is a prompt or a part
    of one: all neurons run. The first pass with a single new token after it selects in every FFN
    the top share of the neurons, by the norm over the prompt's tokens of h / ||h||, and copies
    their rows: from there on a smaller dense FFN runs. A batch runs what one of its sequences
    selected. Each prompt selects anew, and so does each `generate`; what follows on the same cache,
    as the next turn of a talk, is added to what is known of the turns before.

    An expert of an MoE host sees the tokens that are routed to it, and keeps all its neurons for
    sequences of which it saw none. Fused experts are taken apart in place, as `unfused_ffns` does.

    Without a KV cache every pass is a prompt, and nothing is saved. While text is generated, the
    selected rows are twice in memory; of quantised linears the copies are plain.

    Args:
        model: dense, causal, in eval mode; its weights plain, quantised or under adapters.
        share: of the neurons of every FFN, above 0; with 1 the model computes what it ever did.

    Yields:
        The FFNs; `chosen_K` of each tells what it selected.

    Raises:
        ValueError: a share outside (0, 1], or a model that is routed or optimised, that is no
            causal language model, or that has no FFN of a known family. While it lasts, a pass on a
            cache whose prompt was not the last that ran, as in assisted decoding.
    """
    check_selects(model, share)
    settle(model)
    found = unfused_ffns(model)
    with restored(model, found), hooked(_graft(model, found, share)):
        yield prompt_ffns(model)


def install(model: PreTrainedModel, share: float) -> None:
    """The same for as long as a model lives: what a loaded folder does.

    Raises:
        ValueError: a share outside (0, 1], no KV cache, or no FFN of a known family.
    """
    _check_share(share)
    list(_graft(model, unfused_ffns(model), share))


def check_selects(model: PreTrainedModel, share: float) -> None:
    """Whether a model can select by the prompt; its weights do not matter.

    Raises:
        ValueError: as `select_by_prompt`.
    """
    _check_share(share)
    name = type(model).__name__
    if expert_ffns(model):
        raise ValueError(
            f"{name} is routed, which selects neurons for every token: load it with routed=False "
            "to select once a prompt"
        )
    if not continues_text(model):
        raise ValueError(
            f"{name} continues no text, so that no prompt selects its neurons: take a causal "
            "language model"
        )


@contextmanager
def prompt_selected(model: PreTrainedModel, share: float, length: int) -> Iterator[None]:
    """While it lasts, a pass over whole texts computes what generation after a prompt would.

    The first `length` tokens of every sequence are its prompt: they run on all neurons, and select
    those that alone contribute to the tokens after them. Exact, and saves no work. Each sequence
    has a selection of its own, not the union of its batch. A pass of no more than `length` tokens
    is dense.

    Args:
        model: dense, causal; one that selects by the prompt already runs as this says.
        share: as in `select_by_prompt`.
        length: tokens of the prompt, at least 1.

    Raises:
        ValueError: as `select_by_prompt`, or a length below 1.
    """
    check_selects(model, share)
    if length < 1:
        raise ValueError(f"a prompt of {length} tokens selects nothing: give at least 1")
    installed = prompt_ffns(model)
    ffns = [ffn.found for ffn in installed] if installed else unfused_ffns(model)
    with valid_tokens(model) as tokens, hooked(_cutting(model, ffns, tokens, share, length)):
        yield


def _graft(model: PreTrainedModel, found: Sequence[FFN], share: float) -> Iterator[RemovableHandle]:
    passes = PromptPasses()
    for ffn in found:
        graft(model, ffn, PromptFFN(ffn, passes, share))
    yield from passes.hooks(model)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share is {share:g}, but must be above 0 and at most 1")


def _cutting(
    model: nn.Module, ffns: Sequence[FFN], tokens: ValidTokens, share: float, length: int
) -> Iterator[RemovableHandle]:
    for ffn in ffns:
        for name in (ffn.name, *ffn.also):
            holder = model.get_submodule(holder_of(name, ffn.layout))
            down = model.get_submodule(join(holder_of(name, ffn.layout), ffn.layout.down))
            yield down.register_forward_pre_hook(_cut(holder, tokens, share, length))


def _cut(
    ffn: nn.Module, tokens: ValidTokens, share: float, length: int
) -> Callable[..., tuple[Any, ...] | None]:
    """A hook before the way down: after the prompt, h of a neuron that was not selected is 0."""

    @torch.no_grad()
    def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        h_TF, *rest = args
        places = places_of(tokens, ffn, h_TF)
        if places is None or places.length <= length:
            return None
        of_prompt_T = places.position_T < length
        energy = energy_BF(h_TF, places, of_prompt_T)
        keep_TF = top_share_BF(energy, share)[places.sequence_T] | of_prompt_T[:, None]
        return (h_TF.masked_fill(~keep_TF.view_as(h_TF), 0), *rest)

    return cut
