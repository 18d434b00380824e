"""How the F neurons of an FFN are divided into E experts: slices whose sizes differ by at most one.

Letters: T tokens (any leading dimensions), F neurons, E experts, N neurons of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Division:
    """Expert e is a contiguous slice; the first F mod E experts have one neuron more."""

    neurons: int
    num_experts: int
    runs: list[tuple[int, int]] = field(init=False, repr=False, compare=False)
    """(experts, neurons of each): one run, or two where E does not divide F."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= self.neurons:
            raise ValueError(f"{self.neurons} neurons cannot make {self.num_experts} experts")
        size, longer = divmod(self.neurons, self.num_experts)
        runs = [(longer, size + 1), (self.num_experts - longer, size)]
        # now: torch.compile cannot enter the lock of a cached_property, which Python 3.11 has
        object.__setattr__(self, "runs", [run for run in runs if run[0]])

    @classmethod
    def of_size(cls, neurons: int, expert_size: int, name: str = "the FFN") -> Division:
        """F / `expert_size` experts, rounded, halves up.

        Raises:
            ValueError: a size that is no number from 1 to the neurons of the FFN called `name`.
        """
        if not 1 <= expert_size <= neurons:
            raise ValueError(
                f"{name} has {neurons} neurons: experts of {expert_size} are not possible"
            )
        return cls(neurons, (neurons + expert_size // 2) // expert_size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Neurons of each expert."""
        return tuple(size for count, size in self.runs for _ in range(count))

    @property
    def of_neurons(self) -> bool:
        """Every expert is one neuron: a mask of experts is a mask of neurons."""
        return self.num_experts == self.neurons

    def count(self, mask_TE: Tensor) -> int:
        """Neurons of the experts in the mask, summed over the tokens."""
        runs = mask_TE.split([count for count, _ in self.runs], dim=-1)
        return sum(n * int(run.sum()) for run, (_, n) in zip(runs, self.runs, strict=True))

    def sum_TE(self, values_TF: Tensor) -> Tensor:
        """Sum over the neurons of each expert."""
        return self.reduce(values_TF, lambda piece_TEN: piece_TEN.sum(-1))

    def spread_TF(self, values_TE: Tensor) -> Tensor:
        """Each expert's value, once for each of its neurons; the same memory if it has one."""
        if len(self.runs) == 1:
            return _repeated(values_TE, self.runs[0][1])
        parts = values_TE.split([count for count, _ in self.runs], dim=-1)
        pairs = zip(parts, self.runs, strict=True)
        return _joined([_repeated(part, size) for part, (_, size) in pairs])

    def reduce(self, values_TF: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` from (T, E, N) to (T, E), over each run of experts of one size."""
        return _joined([function(piece_TEN) for piece_TEN in self.pieces(values_TF)])

    def pieces(self, values_TF: Tensor) -> Iterator[Tensor]:
        """Views (T, E, N): one, or two where E does not divide F."""
        start = 0
        for count, size in self.runs:
            yield values_TF[..., start : start + count * size].unflatten(-1, (count, size))
            start += count * size


def _repeated(values_TE: Tensor, size: int) -> Tensor:
    """Each value `size` times; the same memory if that is once."""
    return values_TE[..., None].expand(*values_TE.shape, size).flatten(-2)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
