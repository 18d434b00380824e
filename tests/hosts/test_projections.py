"""h of all neurons and of some, against what the model itself sends into its down projections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_tools.experts.conversion import Conversion
from moe_tools.experts.swapped import swap_activations
from moe_tools.hosts.ffn import find_ffns
from tests.families import FAMILIES, NEURONS, UNGATED, build, logits
from tests.hosts.test_activations import SPECS

SOME = torch.tensor([5, 0, NEURONS - 1])
PAIRS = [(f, k) for f in FAMILIES for k in (None, "fatrelu", "drelu")]


@pytest.mark.parametrize(
    ("family", "kind"), [(f, k) for f, k in PAIRS if k != "drelu" or f not in UNGATED]
)
@torch.no_grad()
def test_h_is_what_enters_the_down_projection(family: str, kind: str | None) -> None:
    model = build(family)
    if kind is not None:
        swap_activations(model, Conversion("donor", activation=SPECS[kind]))
    for ffn in find_ffns(model):
        inputs: list[Tensor] = []
        hidden: list[Tensor] = []
        parts = ffn.projections
        handles = [
            parts.up.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0])),
            parts.down.register_forward_pre_hook(lambda _, args, seen=hidden: seen.append(args[0])),
        ]
        logits(model)
        for handle in handles:
            handle.remove()
        (x_TD,), (h_TF,) = inputs, hidden
        assert torch.equal(parts.hidden_TF(x_TD), h_TF)
        some_TK = parts.hidden_TK(x_TD, SOME)
        torch.testing.assert_close(some_TK, h_TF[..., SOME], rtol=1e-5, atol=1e-6)
