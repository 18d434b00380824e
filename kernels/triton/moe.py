"""`moe_ffn` on the Triton kernels: a mask for few tokens, groups for many.

The experts of a layer, one after the other, are one FFN of X N neurons whose mask says which X a
token chose: few tokens go through the launches of `sparse_ffn`. With more than one tile of them the
union is soon everything, and the tokens are grouped by expert instead (`grouped`).

Letters: T tokens, D model width, X experts, N neurons of one expert, K experts of one token.
"""

from __future__ import annotations

from dataclasses import astuple

from torch import Tensor

from moe_tools.kernels.activations import GIVES_ZEROS, Act, named
from moe_tools.kernels.moe import ExpertWeights
from moe_tools.kernels.triton.config import MOST_TOGETHER, Config
from moe_tools.kernels.triton.ffn import DTYPES, no_device
from moe_tools.kernels.triton.op import forward
from moe_tools.kernels.triton.op_grouped import grouped_forward


def moe_ffn_triton(
    experts: ExpertWeights,
    x_TD: Tensor,
    chosen_TK: Tensor,
    weight_TK: Tensor,
    *,
    gate_first: bool | None = None,
    config: Config | None = None,
) -> Tensor:
    """y_TD as `moe_ffn` defines it. The host reads nothing of the device.

    A pair whose weight is zero is not computed in a small batch and gives its weight no gradient.

    Args:
        experts: W_down is copied in every call unless its rows are contiguous.
        x_TD: in fp32, bf16 or fp16, as the experts.
        chosen_TK: which experts; no token chooses one twice.
        weight_TK: what their outputs are multiplied with; any floating dtype.
        gate_first: as in `sparse_ffn_triton`; groups compute gate and up together.
        config: tile sizes; by default pinned ones.

    Raises:
        ValueError: a dtype, an activation or a device that the kernels do not know.
    """
    refusal = _refusal(experts, x_TD)
    if refusal:
        raise ValueError(refusal)
    act, up_act = named(experts.act), named(experts.up_act)
    assert isinstance(act, Act) and isinstance(up_act, Act)
    rows = (_rows(experts.gate_XND), _rows(experts.up_XND), _contiguous(experts.down_XND))
    if rows[0].stride() != rows[1].stride():
        rows = (_contiguous(rows[0]), _contiguous(rows[1]), rows[2])
    acts = (act.name, up_act.name, act.threshold, up_act.threshold)
    sizes = [] if config is None else list(astuple(config))
    x_TD = x_TD.contiguous()
    if len(x_TD) > MOST_TOGETHER:
        pairs = (chosen_TK.contiguous(), weight_TK.contiguous())
        many_TD: Tensor = grouped_forward(x_TD, *rows, *pairs, *acts, sizes)
        return many_TD
    mask_TX = weight_TK.new_zeros(len(x_TD), len(rows[0])).scatter(1, chosen_TK, weight_TK)
    first = act.name in GIVES_ZEROS if gate_first is None else gate_first
    few_TD: Tensor = forward(x_TD, *rows, mask_TX, *[None] * 6, *acts, first, False, sizes)
    return few_TD


def _rows(weight_XND: Tensor) -> Tensor:
    """With contiguous rows, and experts a whole number of them apart."""
    expert, row, column = weight_XND.stride()
    whole = column == 1 and row > 0 and expert % row == 0
    return weight_XND if whole else _contiguous(weight_XND)


def _contiguous(weight_XND: Tensor) -> Tensor:
    """Its strides say so, too: those of a dimension of size one may be anything for PyTorch."""
    return weight_XND.reshape(-1).view(weight_XND.shape)


def _refusal(experts: ExpertWeights, x_TD: Tensor) -> str | None:
    dtypes = {x_TD.dtype, experts.gate_XND.dtype, experts.up_XND.dtype, experts.down_XND.dtype}
    if len(dtypes) > 1 or x_TD.dtype not in DTYPES:
        found = ", ".join(sorted(map(str, dtypes)))
        return f"x_TD and the experts are {found}: the kernels take fp32, bf16 or fp16, one for all"
    if not all(isinstance(named(act), Act) for act in (experts.act, experts.up_act)):
        return "backend 'triton' knows activations by name: give a name or an Act, not a function"
    return no_device(x_TD)
