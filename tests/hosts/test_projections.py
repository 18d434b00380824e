"""h of all neurons and of some, against what the model itself sends into its down projections."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_tools.experts.conversion import Conversion
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.swapped import swap_activations
from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.hosts.layouts import child_name
from tests.coded import CodedLinear
from tests.families import FAMILIES, NEURONS, UNGATED, build, logits, routed
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
    for ffn in unfused_ffns(model):
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


INT8, FP8 = torch.int8, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, INT8) for family in ("llama", "opt", "t5-relu", "t5-gated")),
        *((family, FP8) for family in ("llama", "opt")),  # the stock T5 itself casts to fp8
    ],
)
@torch.no_grad()
def test_a_quantised_down_projection_gets_its_input_as_it_is(
    family: str, dtype: torch.dtype
) -> None:
    """Cast to the dtype of the codes, every hidden value would be a whole number, or 0."""
    dense = build(family)
    model, _ = routed(dense)
    for ffn, found in zip(expert_ffns(model), unfused_ffns(dense), strict=True):
        ffn.set_submodule(child_name(ffn.layout, ffn.layout.down), CodedLinear(ffn.down, dtype))
        found.layer.set_submodule(found.layout.down, CodedLinear(found.down, dtype))
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_numbers_of_a_quantised_linear_are_those_that_it_computes_with() -> None:
    ffn = unfused_ffns(build("llama"))[0]
    exact_FD = ffn.weights().down_FD.clone()
    coded = CodedLinear(ffn.down, torch.int8)
    computed = ffn.projections._replace(down=coded).computed()
    torch.testing.assert_close(computed.down_FD, exact_FD, rtol=0, atol=0.51 * float(coded.scale))
