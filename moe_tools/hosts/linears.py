"""A linear as a matrix, whether it keeps plain numbers or the codes of a quantiser.

Every reader of an FFN's rows comes through `rows`. Codes are nobody's numbers: a linear that does
not hold plain ones is asked for its outputs, which are what the host computes with, and refused
where these are not those of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_tools.hosts.input_threshold import nothing_dropped, threshold_of

COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a linear can be given. A quantised weight has another dtype than the numbers it takes."""
CHUNK = 1024
"""Unit vectors that a linear is given at once."""
PROBES = 8
"""Random inputs that a matrix is compared with its linear on."""
PROBE_ERROR = 0.1
"""How far their outputs may differ, as a share of their norm. Linears that round their input as
well miss by 0.01 in eight bits; a wrong scale or a missing part misses by more than half."""
WAY_OUT = "load the model with moe_tools.load, which dequantises, or take one that is not quantised"


def widths(linear: nn.Module) -> tuple[int, int] | None:
    """How many numbers a linear takes and gives; None for any other module.

    Quantised and adapted linears say it as nn.Linear does, transformers' Conv1D as (nx, nf).
    """
    for pair in (("in_features", "out_features"), ("nx", "nf")):
        found = tuple(getattr(linear, name, None) for name in pair)
        if all(isinstance(width, int) for width in found):
            return found  # type: ignore[return-value]
    return None


def numbers_of(linear: nn.Module) -> int:
    """How many weights the matrix of a module has, whatever it is kept as."""
    found = widths(linear)
    return linear.get_parameter("weight").numel() if found is None else found[0] * found[1]


def base_of(module: nn.Module) -> nn.Module:
    """The linear below PEFT's adapters, which stand around it."""
    inner = getattr(module, "base_layer", module)
    return inner if isinstance(inner, nn.Module) else module


def tensors_of(linear: nn.Module) -> Iterator[Tensor]:
    """Everything that a linear keeps below its adapters, the weight first if it has one."""
    base = base_of(linear)
    return chain(base.parameters(), base.buffers())


def device_of(linear: nn.Module) -> torch.device:
    """Where a linear computes."""
    return next(tensors_of(linear)).device


def dtype_of(linear: nn.Module) -> torch.dtype | None:
    """What a linear is to be given; None: its weight is codes, and does not say it."""
    dtype = getattr(getattr(base_of(linear), "weight", None), "dtype", None)
    return dtype if dtype in COMPUTED else None


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear computes with its input and the numbers of its weight, and nothing else.

    It has no adapter and no threshold on its inputs, and is not quantised.
    """
    return _is_matrix(linear) and threshold_of(linear) is None


def _is_matrix(linear: nn.Module) -> bool:
    return type(linear) in (nn.Linear, Conv1D) and has_numbers(linear)


def has_numbers(linear: nn.Module) -> bool:
    """Whether the weight of a linear, below its adapters, is plain numbers."""
    return is_numbers(getattr(base_of(linear), "weight", None))


def is_numbers(tensor: object) -> bool:
    """Whether something is a parameter of no more than its numbers."""
    return type(tensor) is nn.Parameter and tensor.dtype in COMPUTED


def rows(linear: nn.Module) -> Tensor:
    """(outputs, inputs) of a linear below its adapters: a view, of a quantised one a copy.

    Raises:
        ValueError: a quantised one whose matrix cannot be found.
    """
    base = base_of(linear)
    if not has_numbers(base):
        return dequantised(base)
    weight = base.get_parameter("weight")
    return weight.T if isinstance(base, Conv1D) else weight  # which stores the transpose


def computed_rows(linear: nn.Module) -> Tensor:
    """(outputs, inputs) of what a linear computes with its adapters: of a plain one a view.

    Raises:
        ValueError: as `rows`.
    """
    if _is_matrix(linear) or (base_of(linear) is linear and not has_numbers(linear)):
        return rows(linear)
    return _answers(linear, dtype_of(linear) or torch.float32)


@torch.no_grad()
def dequantised(linear: nn.Module) -> Tensor:
    """(outputs, inputs) of a quantised linear, by what it answers to each unit vector.

    Raises:
        ValueError: it cannot be run as it is, or its answers are not those of a matrix, as where a
            fixed scale cuts its inputs off.
    """
    size = _size(linear)
    if any(tensor.is_meta for tensor in tensors_of(linear)):
        return torch.empty(size[::-1], device="meta", dtype=dtype_of(linear) or torch.float32)
    # bitsandbytes repacks its codes in place where it runs for inference on a CPU.
    training = linear.training
    try:
        linear.training = True
        return _found(linear)
    finally:
        linear.training = training


def _found(linear: nn.Module) -> Tensor:
    dtypes = [dtype_of(linear)] if dtype_of(linear) is not None else list(COMPUTED[:3])
    for dtype in dtypes:
        assert dtype is not None
        try:
            found, error = _answers(linear, dtype), None
        except Exception as raised:  # whatever its quantiser raises for another dtype or device
            error = raised
            continue
        return _checked(linear, found, dtype)
    why = str(error).strip().split("\n")[0]
    raise ValueError(f"a quantised {type(linear).__name__} cannot be read ({why}): {WAY_OUT}")


def outline(linear: nn.Module) -> nn.Linear:
    """A linear of the same widths without numbers."""
    bias = getattr(linear, "bias", None) is not None
    return nn.Linear(*_size(linear), bias=bias, device="meta", dtype=dtype_of(linear))


def as_linear(linear: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A plain linear that computes what a quantised one does.

    Raises:
        ValueError: as `dequantised`.
    """
    made = nn.Linear(*_size(linear), bias=bias_of(linear) is not None, device="meta")
    made.training = linear.training
    made.weight = nn.Parameter(dequantised(linear).to(dtype).contiguous())
    bias = bias_of(linear)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype))
    return made


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias of a linear, if it has one."""
    bias = getattr(linear, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _size(linear: nn.Module) -> tuple[int, int]:
    found = widths(linear)
    assert found is not None
    return found


def _answers(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """(outputs, inputs) of any module that is affine, by the outputs for each unit vector."""
    inputs, _ = _size(linear)
    units = torch.eye(inputs, dtype=dtype, device=device_of(linear))
    with nothing_dropped(linear):
        at_zero = linear(torch.zeros_like(units[:1]))
        return torch.cat([linear(some) - at_zero for some in units.split(CHUNK)]).T


def _checked(linear: nn.Module, rows_FD: Tensor, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(PROBES, rows_FD.shape[1], generator=generator).to(rows_FD.device, dtype)
    with nothing_dropped(linear):
        at_zero = linear(torch.zeros_like(x_TD[:1])).float()
        expected_TF = linear(x_TD).float() - at_zero
    missed = (x_TD.float() @ rows_FD.float().T - expected_TF).norm()
    if not missed <= PROBE_ERROR * expected_TF.norm():
        share = float(missed / expected_TF.norm())
        raise ValueError(
            f"a quantised {type(linear).__name__} cannot be read: what it computes is not the "
            f"product with one matrix, the difference is {share:.2g}: {WAY_OUT}"
        )
    return rows_FD
