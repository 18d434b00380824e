"""An FFN that runs whole on the prompt, and with the neurons that mattered there from then on.

GRIFFIN (arXiv 2404.01365): a neuron matters by the norm, over the tokens of the prompt, of its part
of h / ||h||. The neurons of the top share are copied into a smaller dense FFN.

Letters: B sequences of a batch, T tokens (any leading dimensions), D model width, F neurons of one
FFN, K neurons that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from moe_tools.experts.tokens import ValidTokens
from moe_tools.hosts.ffn import FFN, GraftedFFN
from moe_tools.hosts.projections import Projections
from moe_tools.inference.prompt_passes import PromptPasses


class PromptFFN(GraftedFFN):
    """A dense FFN that goes on with some of its neurons after the prompt.

    Each sequence of a batch has its own top share; all together run what one of them kept.
    """

    done = "selecting its neurons by the prompt"

    def __init__(self, ffn: FFN, passes: PromptPasses, share: float) -> None:
        super().__init__(ffn)
        self.share = share
        self.passes = passes
        self.ran = 0
        """Neurons that ran after the prompt, summed over tokens."""
        self.could = 0
        """Neurons that could have run there."""
        self._energy_BF: Tensor | None = None
        """See `energy_BF`, of the prompt so far."""
        self._chosen_K: Tensor | None = None
        self._few: Projections | None = None
        """The chosen neurons; None: there is no choice yet, or all are chosen."""
        self._seen = (0, 0)
        """The prompt, and the pass over it, that the fields above are of."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD.

        Where only the host computes h (`Layout.masked`), it is h_TF that comes in.

        Raises:
            ValueError: in training, or weights that cannot be copied.
        """
        if self.training:
            raise ValueError(
                f"{self.name} selects neurons by the prompt, for inference alone: load the folder "
                "with routed=False to train it"
            )
        self._keep_up()
        if self.passes.continues:
            return self._continue(x_TD)
        parts = self.projections
        h_TF = x_TD if self.layout.masked else parts.hidden_TF(x_TD)
        self._look(h_TF)
        return parts.project_TD(h_TF)

    @torch.no_grad()
    def chosen_K(self) -> Tensor:
        """The neurons that run after the prompt so far, in their order."""
        self._keep_up()
        if self._energy_BF is None:  # no prompt yet, or an expert that saw none of it
            return torch.arange(self.projections.size[0])
        return top_share_BF(self._energy_BF, self.share).any(0).nonzero().flatten()

    def listen(self) -> None:
        """Nothing: the h that comes in is all that is needed."""

    def _keep_up(self) -> None:
        """Forgets what was seen and chosen before the prompt began, or went on."""
        prompt, chunk = now = self.passes.prompts, self.passes.chunks
        if prompt != self._seen[0]:
            self._energy_BF, self.ran, self.could = None, 0, 0
        if chunk != self._seen[1]:
            self._chosen_K, self._few = None, None
        self._seen = now

    @torch.no_grad()
    def _look(self, h_TF: Tensor) -> None:
        """Adds what the neurons did on a part of the prompt."""
        places = places_of(self.passes.tokens, self, h_TF)
        if places is not None:
            energy = energy_BF(h_TF, places)
            self._energy_BF = energy if self._energy_BF is None else self._energy_BF + energy

    def _continue(self, x_TD: Tensor) -> Tensor:
        if self._chosen_K is None:
            self._choose(x_TD.dtype)
            assert self._chosen_K is not None
        rows = x_TD.shape[:-1].numel()
        self.ran += rows * len(self._chosen_K)
        self.could += rows * self.projections.size[0]
        parts = self._few or self.projections
        if not self.layout.masked:
            return parts.project_TD(parts.hidden_TF(x_TD))
        return parts.project_TD(x_TD if self._few is None else x_TD[..., self._chosen_K])

    def _choose(self, dtype: torch.dtype) -> None:
        chosen_K, parts = self.chosen_K(), self.projections
        try:
            self._few = (
                None if len(chosen_K) == parts.size[0] else parts.of_neurons(chosen_K, dtype)
            )
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        self._chosen_K = chosen_K

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves or casts every tensor, as `to` does: the prompt is to be run again then."""
        self._energy_BF, self._chosen_K, self._few = None, None, None
        self.passes.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def prompt_ffns(model: nn.Module) -> list[PromptFFN]:
    """The FFNs that select by the prompt, in the host's order; empty when none does."""
    return [module for module in model.modules() if isinstance(module, PromptFFN)]


@dataclass(frozen=True)
class Places:
    """Which tokens of a pass the rows are that an FFN gets."""

    sequence_T: Tensor
    position_T: Tensor
    valid_T: Tensor | None
    """Which rows are no padding; None: all of them."""
    shape: torch.Size
    """(sequences, tokens of each) of the pass."""

    @property
    def length(self) -> int:
        """New tokens of a sequence."""
        return self.shape[1]


def places_of(tokens: ValidTokens, ffn: nn.Module, h_TF: Tensor) -> Places | None:
    """Which tokens the rows of an FFN are; None: they are none of the text, but of a picture.

    Args:
        tokens: watches the pass.
        ffn: the module; an expert of an MoE host gets only some of the rows.
        h_TF: what it computes there.
    """
    shape = tokens.shape
    if shape is None or len(shape) != 2:
        return None
    number_T = tokens.rows_T(ffn)
    if number_T is None:
        number_T = torch.arange(shape.numel(), device=h_TF.device)
    if len(number_T) != h_TF.shape[:-1].numel():
        return None
    valid_T = tokens.of_ffn(ffn, h_TF)
    return Places(
        number_T // shape[1],
        number_T % shape[1],
        None if valid_T is None else valid_T.flatten(),
        shape,
    )


def energy_BF(h_TF: Tensor, places: Places, counted_T: Tensor | None = None) -> Tensor:
    """How much each neuron matters to each sequence: the square of GRIFFIN's statistic.

    The sum of (h / ||h||)^2 over the tokens of a sequence, in fp32, so that it adds up over the
    parts of a prompt.

    Args:
        h_TF: hidden activations, any leading dimensions.
        places: of its rows; padding does not count.
        counted_T: which rows count; None: all of them.
    """
    squares_TF = h_TF.detach().reshape(-1, h_TF.shape[-1]).float().square()
    total_T = squares_TF.sum(-1)
    weight_T = torch.where(total_T > 0, 1 / total_T, 0)
    for counts_T in (places.valid_T, counted_T):
        if counts_T is not None:
            weight_T = weight_T.where(counts_T, 0)
    # padding may hold anything, NaN too
    squares_TF.mul_(weight_T[:, None]).masked_fill_(weight_T[:, None] == 0, 0)
    energy = squares_TF.new_zeros(places.shape[0], h_TF.shape[-1])
    return energy.index_add_(0, places.sequence_T, squares_TF)


def top_share_BF(energy_BF: Tensor, share: float) -> Tensor:
    """Which neurons each sequence keeps: its top share, at least one; of equals, the first.

    A sequence of which nothing is known, as an expert saw none of its tokens, keeps all.
    """
    kept = max(1, round(share * energy_BF.shape[-1]))
    order_BF = energy_BF.argsort(dim=-1, descending=True, stable=True)
    mask_BF = torch.zeros_like(energy_BF, dtype=torch.bool).scatter(1, order_BF[:, :kept], True)
    return mask_BF | (energy_BF == 0).all(-1, keepdim=True)
