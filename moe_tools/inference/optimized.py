"""A model that decodes through the sparse kernels: its FFNs are packed, in place, for inference.

Letters: T tokens (any leading dimensions), D model width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.packed_ffn import PackableFFN
from moe_tools.hosts.ffn import FFN, find_ffns, graft
from moe_tools.hosts.kernel_refusal import refusal
from moe_tools.hosts.layouts import child_name
from moe_tools.hosts.zeros import gives_zeros
from moe_tools.inference.quantized_linear import Kind, quantize_linears
from moe_tools.kernels.cpu.screen import no_screen
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.quantize import INT4, QUANTIZED
from moe_tools.kernels.sparse_ffn import Backend, pack

PACKED = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "int4": INT4,
}
"""What FFNs can be packed as, by the names of the command line."""

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger(__name__)


class OptimizedFFN(PackableFFN):
    """A dense FFN that skips what its activation makes zero: the gate first, exact, no router."""

    done = "optimised"

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD.

        Raises:
            ValueError: in training.
        """
        if self.training:
            raise ValueError(f"{self.name} is optimised and cannot be trained: load it again")
        assert self.packed is not None
        return self.packed(x_TD)


def optimize(
    model: Model,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
    screen: float | None = None,
    linears: Kind | None = None,
) -> Model:
    """Packs the FFNs for the sparse kernels, in place, and returns the model: for inference alone.

    A routed FFN computes the experts that its router selects; a dense one whose activation gives
    exact zeros stops at the neurons that its gate turns off. Logits are what they were, but for
    the order of the sums. Every matrix is packed by itself and then freed, so that memory stays
    within one layer of the host above the model. Parameters no longer ask for gradients;
    `state_dict` and `save` give what they gave before, unless `dtype` lost digits.

    Left as they are, with one warning that says why: FFNs whose activation no kernel knows, whose
    linears are not plain, or whose router reads the FFN's own rows. A model without any other is
    refused. A deep copy shares what is packed; `to` casts the rest, and refuses another device.

    Args:
        model: routed, or dense with ReLU or a relative; in eval mode.
        dtype: of the packed matrices: fp32, bf16, fp16, int8 (a scale a row) or int4 (a scale for
            each 32 of a row); the model's own by default.
        backend: see `moe_tools.kernels.sparse_ffn.pack`. `auto` takes the native kernels on a CPU
            and PyTorch elsewhere.
        screen: of FFNs with ReLU or a relative: a copy of the gate in int8 says which neurons
            cannot fire, with a margin in standard deviations of its error (4 misses next to
            nothing, `inf` nothing at all). Half of the gate's bytes, and as much memory more.
        linears: quantize the linears outside the FFNs as well, in eight or four bits (attention
            and head; see `quantize_linears`).

    Raises:
        ValueError: a model that is being trained, scores softly or has no FFN to pack, an unknown
            dtype, backend or kind, one that cannot run here, or a gate that cannot be screened.
    """
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: call model.eval() first")
    if dtype is not None and dtype not in PACKED.values():
        raise ValueError(
            f"weights cannot be packed as {dtype}: {', '.join(map(str, PACKED.values()))} can"
        )
    ffns: Sequence[ExpertFFN | FFN] = expert_ffns(model) or find_ffns(model)
    obstacles = [_obstacle(ffn) for ffn in ffns]
    _report(model, obstacles)
    if screen is not None:
        _check_screen([f for f, o in zip(ffns, obstacles, strict=True) if not o], dtype, screen)
    if linears is not None:
        quantize_linears(
            model, linears, besides=[module for ffn in ffns for module in ffn.projections.linears()]
        )
    for ffn, obstacle in zip(ffns, obstacles, strict=True):
        if obstacle is None:
            off_F = ffn.off_F if isinstance(ffn, ExpertFFN) else None
            weights = replace(ffn.projections.weights(), off_F=off_F)
            packed = pack(weights, dtype=dtype, backend=backend, sole=True, screen=screen)
            _free(_put(model, ffn, packed), dtype)
    for routed in expert_ffns(model):
        _widen_router(routed)
    _fold_head(model)
    return model.requires_grad_(False)


def _obstacle(ffn: ExpertFFN | FFN) -> str | None:
    """Why an FFN stays as it is; None when it can be packed."""
    if isinstance(ffn, FFN):
        if not gives_zeros(ffn.act):
            return f"dense, and {type(ffn.act).__name__} gives no exact zeros"
        return refusal(ffn.projections)
    if ffn.packed is not None:
        return "optimised already"
    if ffn.mode == "soft":
        return "every expert runs in mode soft"
    if ffn.router.reads_rows:
        return f"{type(ffn.router).__name__} reads the FFN's own rows"
    return refusal(ffn.projections)


def _report(model: nn.Module, obstacles: list[str | None]) -> None:
    """Says what is left as it is, in one line.

    Raises:
        ValueError: everything is.
    """
    reasons = Counter(obstacle for obstacle in obstacles if obstacle is not None)
    why = "; ".join(f"{reason} ({count} FFNs)" for reason, count in reasons.items())
    if None not in obstacles:
        raise ValueError(f"{type(model).__name__} has no FFN to optimise: {why}")
    if reasons:
        _log.warning("%s: left as they are: %s", type(model).__name__, why)


def _check_screen(
    ffns: Sequence[ExpertFFN | FFN], dtype: torch.dtype | None, screen: float
) -> None:
    """Before anything is packed.

    Raises:
        ValueError: a gate that cannot be screened.
    """
    for ffn in ffns:
        weights = ffn.projections.weights()
        why = no_screen(weights.act, dtype or weights.up_FD.dtype, screen)
        if why is not None:
            raise ValueError(f"{ffn.name}: {why}")


def _put(model: nn.Module, ffn: ExpertFFN | FFN, packed: PackedFFN) -> PackableFFN:
    """Lets the packed weights compute; the module that does."""
    if isinstance(ffn, ExpertFFN):
        ffn.packed = packed
        return ffn
    module = OptimizedFFN(ffn)
    module.packed = packed
    graft(model, ffn, module)
    return module


def _free(ffn: PackableFFN, dtype: torch.dtype | None) -> None:
    """Leaves names, shapes and dtypes of the matrices; the state dict is read from `packed`."""
    lossy = False
    for linear in ffn.projections.linears():
        weight = linear.get_parameter("weight")
        lossy |= dtype is not None and not _holds(dtype, weight.dtype)
        linear.weight = nn.Parameter(weight.detach().to("meta"), requires_grad=False)

    def fill(ffn: PackableFFN, state: dict[str, Any], prefix: str, _: Any) -> None:
        if lossy:
            raise ValueError(
                f"{ffn.name} is packed as {dtype}, which lost digits: save the model that it was "
                "made from"
            )
        assert ffn.packed is not None
        for name, tensor in _unpacked(ffn, ffn.packed).items():
            state[f"{prefix}{name}"] = tensor

    ffn.register_state_dict_post_hook(fill)  # type: ignore[no-untyped-call]


def _widen_router(ffn: ExpertFFN) -> None:
    """Keeps a router in fp32, in which it computes anyway; saved, it is what it was."""
    dtypes = {f"router.{name}": value.dtype for name, value in ffn.router.state_dict().items()}
    ffn.router.float()

    def narrow(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name, dtype in dtypes.items():
            value = state[f"{prefix}{name}"]
            if value.dtype == torch.float32:  # else the model was cast since
                state[f"{prefix}{name}"] = value.to(dtype)

    ffn.register_state_dict_post_hook(narrow)  # type: ignore[no-untyped-call]


def _fold_head(model: nn.Module) -> None:
    """Shows the head of a language model the last token of a prompt with the strides of a matrix.

    With those of the prompt, and weights that ask for no gradient, torch.matmul takes that token
    for a batch and copies the weights, transposed: 0.4 s for 32000 x 2048.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(_folded)


def _folded(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x_TD, *rest = args
    return (x_TD.reshape(-1, x_TD.shape[-1]).view(x_TD.shape), *rest)


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every number of `other` is one of `dtype`."""
    return dtype not in QUANTIZED and torch.promote_types(other, dtype) == dtype


@torch.no_grad()
def _unpacked(ffn: PackableFFN, packed: PackedFFN) -> dict[str, Tensor]:
    """The matrices as the host has them, whatever its linears fuse or transpose."""
    layout, projections = ffn.layout, deepcopy(ffn.projections)
    for linear in projections.linears():
        linear.to_empty(device=packed.device)
    made, stored = projections.weights(), packed.weights
    for mine, packed_FD in (
        (made.gate_FD, stored.gate_FD),
        (made.up_FD, stored.up_FD),
        (made.down_FD, stored.down_FD),
    ):
        if mine is not None and packed_FD is not None:
            mine.copy_(packed_FD)
    paths = (layout.gate, layout.up, layout.down)
    linears = (projections.gate, projections.up, projections.down)
    return {
        f"{child_name(layout, path)}.weight": linear.get_parameter("weight").detach()
        for path, linear in zip(paths, linears, strict=True)
        if path is not None and linear is not None
    }
