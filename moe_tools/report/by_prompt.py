"""What selection by the prompt costs after it, on texts whose beginning is taken for the prompt.

Letters: S sequences, T tokens, F neurons of one FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.hooks import hooked
from moe_tools.experts.tokens import ValidTokens, valid_tokens
from moe_tools.hosts.ffn import FFN, unfused_ffns
from moe_tools.inference.prompt import prompt_selected
from moe_tools.inference.prompt_ffn import energy_BF, places_of, prompt_ffns, top_share_BF
from moe_tools.measure.evaluate import Evaluation
from moe_tools.measure.unions import SIZES, union


@contextmanager
def measured_by_prompt(
    model: PreTrainedModel, share: float, after: int
) -> Iterator[Callable[[Evaluation], Evaluation]]:
    """While it lasts, the first `after` tokens of a text are its prompt, and select.

    Yields:
        What corrects the figures of an evaluation that was made meanwhile: FLOPs, bytes and
        sparsity become those of the tokens behind the prompt.

    Raises:
        ValueError: `after` is 0, or as `prompt_selected`.
    """
    if after < 1:
        raise ValueError(
            "selection by the prompt is measured on what follows it: give --after, the tokens of "
            "every block that are the prompt"
        )
    installed = prompt_ffns(model)
    ffns = [ffn.found for ffn in installed] if installed else unfused_ffns(model)
    kept = [_Kept(ffn, share, after) for ffn in ffns]
    with valid_tokens(model) as tokens:
        # registered before what cuts h: it sees all of it
        watches = (one.ffn.down.register_forward_pre_hook(one.watch(tokens)) for one in kept)
        with hooked(watches), prompt_selected(model, share, after):
            yield lambda seen: _with_reads(seen, _shares(kept))


def _with_reads(seen: Evaluation, shares: dict[int, float]) -> Evaluation:
    """The figures of a dense model of whose FFNs such shares were computed and read.

    Args:
        seen: measured as if all was.
        shares: tokens of a group -> share; sizes that are missing are left out.
    """
    one = shares[1]
    flops = replace(seen.flops, ffn=seen.flops.ffn_dense * one)
    read = {
        size: replace(traffic, ffn=traffic.ffn * shares[size])
        for size, traffic in seen.traffic.items()
        if size in shares
    }
    return replace(seen, flops=flops, ffn_sparsity=1 - one, traffic=read)


@dataclass
class _Kept:
    """What the sequences of a text keep of one FFN."""

    ffn: FFN
    share: float
    after: int
    tokens: int = 0
    """After the prompt."""
    on: int = 0
    """Neurons, summed over these."""
    masks_SF: list[Tensor] = field(default_factory=list)
    everywhere: bool = True
    """Every token comes here: it is no expert of an MoE host."""

    def watch(self, tokens: ValidTokens) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            places = places_of(tokens, self.ffn.layer, args[0])
            if places is None or places.length <= self.after:
                return
            self.everywhere &= tokens.rows_T(self.ffn.layer) is None
            of_prompt_T = places.position_T < self.after
            kept_SF = top_share_BF(energy_BF(args[0], places, of_prompt_T), self.share)
            follows_T = places.sequence_T[~of_prompt_T]
            self.tokens += len(follows_T)
            self.on += int(kept_SF.sum(1)[follows_T].sum())
            self.masks_SF.append(kept_SF.cpu())

        return see


def _shares(kept: list[_Kept]) -> dict[int, float]:
    """Tokens of a group, each of another sequence -> share of the weights that it reads."""
    sizes = SIZES if all(one.everywhere for one in kept) else (1,)
    return {size: _share(kept, size) for size in sizes if _sequences(kept) >= size}


def _sequences(kept: list[_Kept]) -> int:
    return sum(map(len, kept[0].masks_SF))


def _share(kept: list[_Kept], size: int) -> float:
    read = whole = 0.0
    for one in kept:
        numbers, neurons = one.ffn.projections.numbers, one.ffn.neurons
        if size == 1:
            read += numbers * one.on / neurons
            whole += numbers * one.tokens
            continue
        mask_SF = torch.cat(one.masks_SF)
        union_GF = union(mask_SF, torch.arange(len(mask_SF)), len(mask_SF), size)
        read += numbers * int(union_GF.sum()) / neurons
        whole += numbers * len(union_GF)
    return read / (whole or 1)
