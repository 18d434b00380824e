"""`sparse_ffn`, the public operation of the kernels: an FFN of which only some experts run.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_tools.kernels.activations import ActivationLike
from moe_tools.kernels.cpu.native import isas
from moe_tools.kernels.cpu.packed import CpuFFN, unsupported
from moe_tools.kernels.packed import PackedFFN, ReferenceFFN
from moe_tools.kernels.quantize import QUANTIZED, rounded
from moe_tools.kernels.reference import sparse_ffn_reference
from moe_tools.kernels.weights import FFNWeights

Backend = Literal["auto", "cpu", "triton", "reference"]

_log = logging.getLogger("moe_tools.kernels")


def sparse_ffn(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    mask_TE: Tensor | None = None,
    *,
    act: ActivationLike,
    gate_FD: Tensor | None = None,
    up_F: Tensor | None = None,
    gate_F: Tensor | None = None,
    down_D: Tensor | None = None,
    up_act: ActivationLike = "identity",
    off_F: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Runs only the experts that `mask_TE` selects and returns y_TD.

    Experts are contiguous slices of the F neurons; where E does not divide F, the first F mod E
    experts have one neuron more; with E = F the mask chooses neurons. Without a mask every neuron
    may run. `down_FD` is W_down transposed, so that one neuron is one row of each weight.
    `gate_FD` makes the FFN gated (h = act(gate x) * up_act(up x)); without it h = act(up x). The
    bias `down_D` is added once, the other two belong to their neurons. A neuron that is off
    contributes `off_F` to h, where there is one, in place of zero.

    Differentiable in every floating input, the mask included; backend "cpu" is not, and refuses.
    A native backend wants its weights packed: pack once with `pack` and call the result;
    `backend="cpu"` packs for this one call. `backend="triton"` takes weights as they are, where
    each row is contiguous. On a GPU auto takes it where `triton.limits` expects it to be faster, at
    half of the neurons a token; never for a mask that learns, whose gradient is another there.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or one that cannot run this or has
            no gradients.
    """
    weights = FFNWeights(up_FD, down_FD, act, gate_FD, up_F, gate_F, down_D, up_act, off_F)
    weights.check_call(x_TD, mask_TE)
    if _known(backend) == "cpu":
        if weights.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "backend 'cpu' has no gradients, and a weight asks for one: use torch.no_grad(), "
                "or backend 'reference'"
            )
        return pack(weights, backend=backend)(x_TD, mask_TE)
    if backend == "triton" or (backend == "auto" and _pays_on_gpu(weights, x_TD, mask_TE)):
        y_TD: Tensor = triton_kernels("ffn").sparse_ffn_triton(weights, x_TD, mask_TE)
        return y_TD
    return sparse_ffn_reference(weights, x_TD, mask_TE)


def _pays_on_gpu(weights: FFNWeights, x_TD: Tensor, mask_TE: Tensor | None) -> bool:
    if not on_gpu(x_TD) or (mask_TE is not None and mask_TE.requires_grad):
        return False
    if triton_kernels("ffn").unsupported(weights, x_TD, mask_TE):
        return False
    return bool(triton_kernels("packed").pays(weights, x_TD))


def pack(
    weights: FFNWeights,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
    sole: bool = False,
    screen: float | None = None,
    share: float | None = None,
) -> PackedFFN:
    """Copies the weights into the form that a backend reads: packed(x_TD, mask_TE) is y_TD.

    The reference has no form of its own for int8 and int4: it rounds the weights to what these
    could hold and keeps their dtype, which saves no memory. It does so where it is named, being
    the definition of what the kernels compute; auto refuses.

    Args:
        weights: of one FFN.
        dtype: in which they are stored, theirs by default; int8 and int4 have a scale for each 32
            of a row, and x is rounded to int8 in such groups, too (not on Triton).
        backend: auto takes the fastest that can run this, and goes through matrix products where
            those are faster. A named backend runs whatever the speed.
        sole: let go of `weights`, so that whoever owns them can free them: matrix products, too,
            then read the copy. Only the reference keeps what already has its dtype.
        screen: of backend cpu, see `CpuFFN`: a copy of the gate in int8 leaves out what cannot
            fire, with a margin in standard deviations, or `inf`. The others need none.
        share: of its neurons that one token wants, on a GPU, where nobody can count them in time:
            it says for how many tokens the kernels pay (`TritonFFN`).

    Raises:
        ValueError: an unknown backend, one that cannot run this, or int8 and int4 where auto finds
            no kernel that reads them.
    """
    dtype = dtype or weights.up_FD.dtype
    if _known(backend) == "auto" and on_gpu(weights.up_FD):
        triton = triton_kernels("packed")
        if (why_not := triton.cannot_store(weights, dtype)) is None:
            packed: PackedFFN = triton.TritonFFN(weights, dtype, or_dense=True, share=share)
            _announce_card(*triton.known(packed))
            return packed
        if dtype in QUANTIZED:
            raise ValueError(why_not)
        left_to_pytorch(why_not)
    elif backend == "auto":
        why_not = unsupported(weights, dtype)
        if dtype in QUANTIZED and (why := why_not or _missing()):
            raise ValueError(
                f"no kernel reads {dtype} here, and PyTorch would only round, without saving "
                "memory: take fp32, bf16 or fp16, or backend='reference' to round on purpose "
                f"({why})"
            )
        if why_not is None and (isa := native_cpu()):
            announce(isa)
            return CpuFFN(weights, dtype, sole=sole, screen=screen)
    if backend == "cpu":
        return CpuFFN(weights, dtype, or_dense=False, screen=screen)
    if backend == "triton":
        stored: PackedFFN = triton_kernels("packed").TritonFFN(weights, dtype, share=share)
        return stored
    return ReferenceFFN(rounded(weights, dtype), integers=dtype in QUANTIZED)


@functools.cache
def native_cpu() -> str | None:
    """Returns the instruction set of the native CPU kernels; None where they are not there.

    The log then warns, once, and says why.
    """
    why = _missing()
    if why is None:
        return isas()[-1]
    _log.warning("sparse_ffn runs on PyTorch alone: %s", why)
    return None


def _missing() -> str | None:
    """Returns why the native CPU kernels are not there; None when they are."""
    try:
        isas()
    except ValueError as error:
        return str(error)
    return None


@functools.cache
def announce(isa: str) -> None:
    """Logs once which kernels were chosen."""
    _log.info("sparse_ffn runs on native CPU kernels, %s", isa)


@functools.cache
def _announce_card(card: str, measured: bool) -> None:
    """Logs once that the Triton kernels were chosen, and by what they give way to products."""
    limits = "as measured" if measured else "by guesses: `make gpu` measures this card"
    _log.info("sparse_ffn runs on Triton kernels, %s; products take over %s", card, limits)


@functools.cache
def left_to_pytorch(why: str) -> None:
    """Logs once why a GPU runs an FFN without our kernels."""
    _log.warning("sparse_ffn runs on PyTorch alone: %s", why)


def backends() -> list[str]:
    """Returns the backends of `sparse_ffn` that run here, the fastest first, without `auto`."""
    missing = {
        "cpu": not native_cpu(),
        "triton": not (torch.cuda.is_available() and _has_triton()),
    }
    return [name for name in get_args(Backend)[1:] if not missing.get(name)]


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is where the Triton kernels run; the log says once if only Triton lacks."""
    if not tensor.is_cuda:
        return False
    if not _has_triton():
        left_to_pytorch("Triton is not installed: pip install 'moe-tools[gpu]'")
    return _has_triton()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


_LOADED: dict[str, ModuleType] = {}
"""What was imported: torch.compile traces a look into a dictionary, and no import."""


def triton_kernels(module: Literal["ffn", "moe", "packed"]) -> ModuleType:
    """Imports the Triton kernels, on demand.

    Raises:
        ValueError: Triton is not installed.
    """
    if module in _LOADED:
        return _LOADED[module]
    try:
        _LOADED[module] = importlib.import_module(f"moe_tools.kernels.triton.{module}")
        return _LOADED[module]
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError(
            "backend 'triton' needs Triton, which is not installed: pip install 'moe-tools[gpu]'"
        ) from error


def _known(backend: Backend) -> Backend:
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(get_args(Backend))}")
    return backend
