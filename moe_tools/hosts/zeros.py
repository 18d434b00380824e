"""Exact zeros among hidden activations: which activations give them, and how many there are.

Letters: T tokens, F neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_tools.hosts.activations import HostOnly


@torch.no_grad()
def gives_zeros(act: nn.Module) -> bool:
    """Whether an activation is exactly 0 for what is clearly negative: ReLU and its relatives.

    SiLU and GELU come close to 0 far out, and may round to it there: that is no sparsity.
    """
    if isinstance(act, HostOnly):  # nobody can say
        return False
    act = _with_numbers(act)
    device = next((tensor.device for tensor in act.state_dict().values()), torch.device("cpu"))
    return bool((act(torch.tensor([-1.0], device=device)) == 0).all())


def _with_numbers(act: nn.Module) -> nn.Module:
    """The activation, or where its own numbers are not loaded one in which they all are 1.

    Which zeros it gives depends on its formula, but for single values of these numbers.
    """
    own = act.state_dict().values()
    if not any(tensor.is_meta for tensor in own):
        return act
    filled = copy.deepcopy(act).to_empty(device="cpu")
    for tensor in filled.state_dict().values():
        tensor.fill_(1)
    return filled


@torch.no_grad()
def zero_share(hidden_TF: Sequence[Tensor]) -> float:
    """Share of the entries that are exactly 0, over tokens, neurons and FFNs; 0 of no tensor."""
    zeros = sum(int((h_TF == 0).sum()) for h_TF in hidden_TF)
    return zeros / max(1, sum(h_TF.numel() for h_TF in hidden_TF))
