"""An FFN in the words of the kernels, and why one cannot be said in them."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import activations as stock
from transformers.pytorch_utils import Conv1D

from moe_tools.hosts.activations import (
    Activation,
    DReLU,
    FATReLU,
    ReLU,
    ShiftedReLU,
    SquaredReLU,
)
from moe_tools.hosts.projections import Projections
from moe_tools.kernels.activations import Act, ActName
from moe_tools.kernels.weights import FFNWeights

ACTS: dict[type[nn.Module], ActName] = {
    nn.ReLU: "relu",
    ReLU: "relu",
    DReLU: "relu",
    stock.ReLUSquaredActivation: "relu2",
    SquaredReLU: "relu2",
    FATReLU: "fatrelu",
    ShiftedReLU: "shifted_relu",
    nn.SiLU: "silu",
    stock.SiLUActivation: "silu",
    stock.GELUActivation: "gelu",
    stock.NewGELUActivation: "gelu_tanh",
    stock.GELUTanh: "gelu_tanh",
}
"""Class of an activation, a host's or ours -> what the kernels call it. A subclass is another."""


def refusal(projections: Projections) -> str | None:
    """Why no kernel can stand in for these modules; None when one can."""
    if type(projections.act) not in ACTS:
        return f"no kernel computes {type(projections.act).__name__}"
    for module in projections.linears():
        if type(module) not in (nn.Linear, Conv1D):  # an adapter or a quantiser computes more
            return f"a projection is a {type(module).__name__}, no plain linear"
    dtypes = {matrix.dtype for matrix in projections.weights().matrices()}
    if len(dtypes) > 1:
        return f"its projections are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    return None


def act_of(module: nn.Module) -> Act | None:
    """An activation in the words of the kernels, None where none of them computes it."""
    if type(module) not in ACTS:
        return None
    return Act(ACTS[type(module)], module.threshold if isinstance(module, Activation) else 0.0)


def up_act_of(module: nn.Module) -> ActName:
    """What becomes of the up row of a gated FFN with this activation."""
    return "relu" if isinstance(module, DReLU) else "identity"


def kernel_weights(projections: Projections, off_F: Tensor | None = None) -> FFNWeights:
    """Views of the weights of modules that nothing refuses; `off_F` stands in for what is off."""
    weights, act = projections.weights(), act_of(projections.act)
    assert act is not None
    return FFNWeights(
        weights.up_FD,
        weights.down_FD,
        act,
        weights.gate_FD,
        weights.up_F,
        weights.gate_F,
        weights.down_D,
        up_act_of(projections.act),
        off_F,
    )
