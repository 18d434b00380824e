"""Why no kernel can stand in for an FFN."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from moe_tools.hosts.activations import KERNEL_ACTS
from moe_tools.hosts.projections import Projections


def refusal(projections: Projections) -> str | None:
    """Why no kernel can stand in for these modules; None when one can."""
    if type(projections.act) not in KERNEL_ACTS:
        return f"no kernel computes {type(projections.act).__name__}"
    for module in projections.linears():
        if type(module) not in (nn.Linear, Conv1D):  # an adapter or a quantiser computes more
            return f"a projection is a {type(module).__name__}, no plain linear"
    dtypes = {matrix.dtype for matrix in projections.weights().matrices()}
    if len(dtypes) > 1:
        return f"its projections are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    return None
