"""The reason why the sparse kernels cannot compute an FFN."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from moe_tools.hosts.activations import KERNEL_ACTS
from moe_tools.hosts.projections import Projections


def refusal(projections: Projections) -> str | None:
    """The reason why the kernels cannot compute what these modules do; None when they can."""
    if type(projections.act) not in KERNEL_ACTS:
        return f"no kernel computes {type(projections.act).__name__}"
    for module in projections.linears():  # an adapter or a quantiser computes something else
        if type(module) not in (nn.Linear, Conv1D):
            return f"a projection is a {type(module).__name__}, no plain linear"
        kind = type(module.weight)
        if kind is not nn.Parameter:
            return f"the weight of a projection is a {kind.__name__}, no plain parameter"
    dtypes = {matrix.dtype for matrix in projections.weights().matrices()}
    if len(dtypes) > 1:
        return f"its projections are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    return None
