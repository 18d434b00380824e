"""Measures which FFNs find the same tokens alike: CKA of their masks, in a stream.

Letters: L FFNs of one stack, S sampled tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_tools.inspection.watch import Seen, Tokens

SAMPLE = 256
"""Tokens that are compared with each other."""
LEAST = 4
"""Fewest tokens that the unbiased HSIC is defined for."""


class Similarity:
    """Linear CKA (Kornblith et al., arXiv 1905.00414) between the masks of FFNs.

    It compares which tokens share experts, so experts need no counterpart in another FFN. HSIC is
    the unbiased estimate over minibatches (Nguyen et al., arXiv 2010.15327): up to `SAMPLE` tokens
    of a pass, short passes joined. A token that an MoE host gave elsewhere has every expert off.
    """

    def __init__(self, names: list[str], sizes: list[int]) -> None:
        self.names = names
        self._sizes = dict(zip(names, sizes, strict=True))
        self._masks: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
        self._numbers: list[Tensor] = []
        """Of the tokens that are sampled, a tensor a pass."""
        self._pass: Tokens | None = None
        self._hsic_LL = torch.zeros(len(names), len(names), dtype=torch.float64)

    def add(self, seen: Seen) -> None:
        """Adds what one FFN decided in a forward pass."""
        if seen.tokens is not self._pass:
            self._begin(seen.tokens)
        held = sum(map(len, self._numbers[:-1]))
        fits = seen.row_T < SAMPLE - held
        numbers = seen.number_T[fits]
        self._masks[seen.ffn.name].append((numbers.cpu(), seen.mask_TE[fits].cpu()))

    def cka_LL(self) -> Tensor:
        """Similarities so far; NaN where a mask never changes, or too few tokens were seen."""
        self._compare()
        norm_L = self._hsic_LL.diagonal().clamp_min(0).sqrt()
        return self._hsic_LL / (norm_L[:, None] * norm_L[None])

    def _begin(self, tokens: Tokens) -> None:
        """Compares the tokens of earlier passes if there are enough of them, or keeps them."""
        if sum(map(len, self._numbers)) >= SAMPLE:
            self._compare()
        room = SAMPLE - sum(map(len, self._numbers))
        self._numbers.append(tokens.number_T[:room].cpu())
        self._pass = tokens

    def _compare(self) -> None:
        numbers = torch.cat(self._numbers) if self._numbers else torch.zeros(0)
        if len(numbers) >= LEAST:
            grams = [_centred_gram(self._mask_SE(name, numbers)) for name in self.names]
            gram_LSS = torch.stack(grams).flatten(1)
            scale = len(numbers) * (len(numbers) - 3)
            self._hsic_LL += (gram_LSS @ gram_LSS.T).double() / scale
        self._numbers.clear()
        for masks in self._masks.values():
            masks.clear()

    def _mask_SE(self, name: str, numbers: Tensor) -> Tensor:
        mask_SE = torch.zeros(len(numbers), self._sizes[name])
        for number_T, mask_TE in self._masks[name]:
            mask_SE[torch.searchsorted(numbers, number_T)] = mask_TE.float()
        return mask_SE


def _centred_gram(mask_SE: Tensor) -> Tensor:
    """The matrix K~ with tr(K~ L~) / (S (S - 3)) the unbiased HSIC of Song et al. (JMLR 2012).

    Centred so that rows sum to 0 although the diagonal is 0 (Szekely and Rizzo, 2014).
    """
    samples = len(mask_SE)
    gram_SS = mask_SE @ mask_SE.T
    gram_SS.fill_diagonal_(0)
    rows_S1 = gram_SS.sum(1, keepdim=True) / (samples - 2)
    total = gram_SS.sum() / ((samples - 1) * (samples - 2))
    centred_SS = gram_SS - rows_S1 - rows_S1.T + total
    return centred_SS.fill_diagonal_(0)
