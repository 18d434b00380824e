"""Optimises a model for inference, in place: FFNs and linears are packed for the native kernels.

Letters: T tokens (any leading dimensions), D model width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.packed_ffn import PackableFFN
from moe_tools.experts.routers.few_bits import FewBitsRouter
from moe_tools.hosts.ffn import FFN, graft, unfused_ffns
from moe_tools.hosts.input_threshold import threshold_of, thresholds_in
from moe_tools.hosts.kernel_refusal import refusal
from moe_tools.hosts.proof import settle
from moe_tools.hosts.zeros import gives_zeros
from moe_tools.inference.card_limits import use_known_cards
from moe_tools.inference.fuse_layers import fuse_layers
from moe_tools.inference.fused_stack import fuse_stack
from moe_tools.inference.measured_limits import use_measured
from moe_tools.inference.packed_linear import Kind, can_pack, pack_linears
from moe_tools.inference.residual import fuse_residuals
from moe_tools.inference.state import free_matrices, widen_router
from moe_tools.kernels.cpu.packed import CpuFFN
from moe_tools.kernels.packed import PackedFFN, checked_share
from moe_tools.kernels.quantize import INT4
from moe_tools.kernels.sparse_ffn import Backend, on_gpu, pack
from moe_tools.kernels.weights import FFNWeights

PACKED = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "int4": INT4,
}
"""The dtypes that FFNs can be packed as, by their names on the command line."""

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger(__name__)


class OptimizedFFN(PackableFFN):
    """A dense FFN that skips what its activation makes zero: the gate first, exact, no router."""

    done = "optimised"

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
        """Computes y_TD, plus the residual where an optimised layer gives it.

        Raises:
            ValueError: in training.
        """
        if self.training:
            raise ValueError(f"{self.name} is optimised and cannot be trained: load it again")
        assert self.packed is not None
        return self.packed(x_TD, residual_TD=residual_TD)


def optimize(
    model: Model,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
    screen: float | None = None,
    linears: Kind | None = None,
    share: float | None = None,
) -> Model:
    """Packs a model for the sparse kernels, in place, and returns it: for inference alone.

    On a CPU every plain linear outside the FFNs runs on the native kernels too, in its own dtype:
    attention and head, and those of dense FFNs that give no zeros.

    A routed FFN computes the experts that its router selects; a dense one whose activation gives
    exact zeros stops at the neurons that its gate turns off. Logits are what they were, but for
    the order of the sums. Every matrix is packed by itself and then freed, so that memory stays
    within one layer of the host above the model. Parameters no longer ask for gradients;
    `state_dict` and `save` give what they gave before, unless `dtype` lost digits.

    A new token of decoder layers of known forms (`layer_forms.py`) is computed natively from the
    norms to the sums, and of all layers in one call where they are alike, once each is proven to
    give its host's numbers; whoever hooks, replaces or observes a part has the host's own code run.

    Routers that propose neurons in up to four bits keep their copies in these. FFNs whose
    activation no kernel knows, whose linears are not plain, or whose router reads the FFN's own
    rows (all others that do) stay as they are, with one warning that says why; a routed model
    without any other is refused. A deep copy shares what is packed; `to` casts the rest, and
    refuses another device. torch.compile makes one graph of the model; pickle and torch.save keep
    it optimised.

    Args:
        model: routed, or dense; in eval mode.
        dtype: of the packed FFNs: fp32, bf16, fp16, or int8 and int4 with a scale for each 32 of a
            row (`few_bits.store_rows`: what the step `quantize` stored stays as it is); the model's
            own by default. With int8 and int4 products are of integers, and x is rounded to int8;
            they need a kernel that reads them.
        backend: see `moe_tools.kernels.sparse_ffn.pack`. `auto` takes the native kernels on a CPU,
            and the Triton kernels on a GPU, where they can run the FFN.
        screen: of FFNs with ReLU or a relative: a copy of the gate in int8 says which neurons
            cannot fire, with a margin in standard deviations of its error (4 misses next to
            nothing, `inf` nothing at all). Half of the gate's bytes, and as much memory more.
        share: of its neurons that a token wants, on a GPU, where the host never asks how many run:
            it decides for how many tokens the kernels are taken (`kernels.triton.limits`). By
            default what a top-k selector says, or half.
        linears: round the linears outside the FFNs, too, to eight or four bits (attention and head;
            see `pack_linears`), and those of dense FFNs that cannot be packed.

    Raises:
        ValueError: a model that is being trained, scores softly, weighs its experts or has no FFN
            to pack, an unknown dtype, backend or kind, one that cannot run here, a share outside
            (0, 1], or a gate that cannot be screened; nothing is changed then.
    """
    _check(model, dtype, share)
    use_known_cards()
    settle(model)
    ffns: Sequence[ExpertFFN | FFN] = expert_ffns(model) or unfused_ffns(model)
    packing = _Packing(dtype, backend, screen, share)
    native = backend in ("auto", "cpu")
    needed = linears is None and not (native and can_pack(model) and not expert_ffns(model))
    packable = _packable(model, ffns, backend, needed=needed)
    for ffn in packable:
        packing.check(ffn)
    if linears is not None and thresholds_in(model):
        raise ValueError(
            "linears cannot be quantized here where inputs have thresholds: leave linears away"
        )
    dense = [
        ffn
        for ffn in ffns
        if isinstance(ffn, FFN) and ffn not in packable and refusal(ffn.projections) is None
    ]
    own = [ffn for ffn in ffns if ffn in packable or isinstance(ffn, ExpertFFN)]
    if native or linears is not None:
        besides = [linear for ffn in own for linear in ffn.projections.linears()]
        pack_linears(model, linears, besides)
    for ffn in packable:
        packed = packing.pack(ffn)
        if isinstance(ffn, ExpertFFN) and isinstance(ffn.router, FewBitsRouter):
            ffn.router.pack(packed.backend)
        free_matrices(_put(model, ffn, packed), dtype)
    for routed in expert_ffns(model):
        widen_router(routed, packs=native)
    fuse_residuals(model)
    if native:
        fuse_layers(model, dense)
        fuse_stack(model)
        use_measured(_dtypes(model))
    _fold_head(model)
    return model.requires_grad_(False)


def _check(model: nn.Module, dtype: torch.dtype | None, share: float | None) -> None:
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: call model.eval() first")
    if dtype is not None and dtype not in PACKED.values():
        raise ValueError(
            f"weights cannot be packed as {dtype}: {', '.join(map(str, PACKED.values()))} can"
        )

    if share is not None:
        checked_share(share)


def _packable(
    model: nn.Module, ffns: Sequence[ExpertFFN | FFN], backend: Backend, *, needed: bool
) -> list[ExpertFFN | FFN]:
    """Returns the FFNs that can be packed; one warning says why the others stay as they are.

    Raises:
        ValueError: there are only others, and one is needed.
    """
    obstacles = [_obstacle(ffn, backend) for ffn in ffns]
    pairs = list(zip(ffns, obstacles, strict=True))
    reasons = Counter(
        obstacle
        for ffn, obstacle in pairs
        if obstacle is not None and (needed or isinstance(ffn, ExpertFFN))
    )
    why = "; ".join(f"{reason} ({count} FFNs)" for reason, count in reasons.items())
    if needed and None not in obstacles:
        raise ValueError(f"{type(model).__name__} has no FFN to optimise: {why}")
    if reasons:
        _log.warning("%s: left as they are: %s", type(model).__name__, why)
    return [ffn for ffn, obstacle in pairs if obstacle is None]


def _obstacle(ffn: ExpertFFN | FFN, backend: Backend) -> str | None:
    """Returns why an FFN stays as it is; None when it can be packed."""
    if any(threshold_of(linear) is not None for linear in ffn.projections.linears()):
        return "its inputs have thresholds, which kernels of experts do not know"
    if isinstance(ffn, FFN):
        if not gives_zeros(ffn.act):
            return f"dense, and {type(ffn.act).__name__} gives no exact zeros"
        return refusal(ffn.projections)
    if ffn.packed is not None:
        return "optimised already"
    if ffn.mode == "soft":
        return "every expert runs in mode soft"
    if ffn.mode == "weighted":
        return (
            "the kernels take no weight for each expert, as mode weighted has them: use mode hard, "
            "or export it as a stock MoE"
        )
    if isinstance(ffn.router, FewBitsRouter):
        obstacle = ffn.router.cannot_pack(_backend_of(ffn, backend))
        if obstacle is not None:
            return obstacle
    elif ffn.router.reads_rows:
        return f"{type(ffn.router).__name__} reads the FFN's own rows"
    return refusal(ffn.projections)


def _backend_of(ffn: ExpertFFN, backend: Backend) -> Backend:
    """What auto is where an FFN is, as far as a router has to know."""
    on_card = backend == "auto" and on_gpu(ffn.projections.weights().up_FD)
    return "triton" if on_card else backend


@dataclass(frozen=True)
class _Packing:
    """How every FFN is packed."""

    dtype: torch.dtype | None
    backend: Backend
    screen: float | None
    share: float | None

    def check(self, ffn: ExpertFFN | FFN) -> None:
        """Packs the first neuron, to hear what `pack` refuses before anything is changed.

        Raises:
            ValueError: what it refuses, with the name of the FFN.
        """
        try:
            self._pack(ffn, _weights(ffn).rows(slice(1)))
        except ValueError as error:
            raise ValueError(f"{ffn.name}: {error}") from error

    def pack(self, ffn: ExpertFFN | FFN) -> PackedFFN:
        """Packs the whole FFN; its own matrices can then be freed."""
        return self._pack(ffn, _weights(ffn))

    def _pack(self, ffn: ExpertFFN | FFN, weights: FFNWeights) -> PackedFFN:
        share = ffn.share if self.share is None and isinstance(ffn, ExpertFFN) else self.share
        return pack(
            weights,
            dtype=self.dtype,
            backend=self.backend,
            sole=True,
            screen=self.screen,
            share=share,
        )


def _weights(ffn: ExpertFFN | FFN) -> FFNWeights:
    weights = ffn.projections.weights()
    return replace(weights, off_F=ffn.off_F) if isinstance(ffn, ExpertFFN) else weights


def _put(model: nn.Module, ffn: ExpertFFN | FFN, packed: PackedFFN) -> PackableFFN:
    """Lets the packed weights compute; returns the module that does."""
    if isinstance(ffn, ExpertFFN):
        ffn.packed = packed
        return ffn
    module = OptimizedFFN(ffn)
    module.packed = packed
    graft(model, ffn, module)
    return module


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    """Those of FFNs that the native kernels hold, where x is in bf16."""
    packed = [module.packed for module in model.modules() if isinstance(module, PackableFFN)]
    found = {one.kernel.stored.rows.dtype for one in packed if isinstance(one, CpuFFN)}
    in_bf16 = any(one.dtype == torch.bfloat16 for one in model.parameters())
    return found if in_bf16 else set()


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
