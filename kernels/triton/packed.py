"""`TritonFFN`: an FFN that is stored as the Triton kernels read it, and called often.

Letters: T tokens (any leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from moe_tools.kernels.activations import Act
from moe_tools.kernels.packed import PackedFFN, checked_share
from moe_tools.kernels.quantize import INT4, QUANTIZED
from moe_tools.kernels.reference import sparse_ffn_reference
from moe_tools.kernels.scores import FewBitScores, LinearScores, Scores
from moe_tools.kernels.triton import limits
from moe_tools.kernels.triton.config import Config
from moe_tools.kernels.triton.ffn import (
    DTYPES,
    UNNAMED,
    activation_options,
    constant_D,
    elsewhere,
    flat,
    goes_gate_first,
    no_device,
)
from moe_tools.kernels.triton.op import forward
from moe_tools.kernels.triton.op_scored import proposed, routed
from moe_tools.kernels.triton.routed import fits
from moe_tools.kernels.triton.stored import Rows, store
from moe_tools.kernels.weights import FFNWeights

NAMES: dict[torch.dtype, limits.Dtype] = dict(
    zip((*DTYPES, torch.int8, INT4), get_args(limits.Dtype), strict=True)
)
"""The dtypes that are stored, by the names of the table of limits."""
ASSUMED = 0.5
"""Share of its neurons that a token is taken to want, where nobody says."""


class TritonFFN(PackedFFN):
    """Copies of the weights, a neuron a row; x may be fp32, bf16 or fp16 whatever the copies are.

    In int8 and int4 a row has a bf16 scale for each 32 columns (`few_bits.store_rows`); what lies
    on that grid already stays as it is. x is not rounded.

    Args:
        weights: copied. What is off may add a constant (`off_F`).
        dtype: fp32, bf16, fp16, int8 or int4.
        or_dense: go through matrix products where `limits` expects these to be faster; of int8 and
            int4 the numbers are made first, in each call.
        share: of its neurons that one token wants, which decides that; None: `ASSUMED`. How many
            really run is known on the device alone, and the host never waits for it.

    Raises:
        ValueError: a dtype or an activation that the kernels do not know, or a share that is none.
    """

    backend = "triton"
    adds = True
    selects = True

    def __init__(
        self,
        weights: FFNWeights,
        dtype: torch.dtype,
        *,
        or_dense: bool = False,
        share: float | None = None,
    ) -> None:
        refusal = cannot_store(weights, dtype)
        if refusal:
            raise ValueError(refusal)
        self._dtype, self._or_dense = dtype, or_dense
        self._share = ASSUMED if share is None else checked_share(share)
        matrices = {"up_FD": weights.up_FD, "down_FD": weights.down_FD, "gate_FD": weights.gate_FD}
        self._rows = {name: store(one, dtype) for name, one in matrices.items() if one is not None}
        kept = weights.up_FD.dtype if dtype in QUANTIZED else dtype

        def copy(bias: Tensor) -> Tensor:
            return bias.detach().to(kept, copy=True, memory_format=torch.contiguous_format)

        copied = weights.changed(_shape, copy)
        if dtype not in QUANTIZED:
            copied = _with_rows(copied, {name: one.stored for name, one in self._rows.items()})
        super().__init__(copied)
        self._operands = self._laid_out()
        self.limits = self._find_limits()
        """Where matrix products are expected to be faster, and the tiles."""

    @property
    def device(self) -> torch.device:
        """The device that holds the stored numbers."""
        return self._rows["up_FD"].stored.device

    @property
    def stored(self) -> tuple[Rows, ...]:
        """The rows of up, down and, where there is one, gate."""
        return tuple(self._rows.values())

    def run(
        self,
        x_TD: Tensor,
        mask_TE: Tensor | None = None,
        residual_TD: Tensor | None = None,
        *,
        gate_first: bool | None = None,
        config: Config | None = None,
    ) -> Tensor:
        """Computes y_TD on the kernels, whatever they take; see `sparse_ffn_triton`.

        Raises:
            ValueError: shapes that do not fit, tensors that are on another device, an x that no
                kernel takes, or gates first where that leaves something out.
        """
        self.check_call(x_TD, mask_TE, residual_TD)
        first = goes_gate_first(self.weights)
        if gate_first and not first:
            raise ValueError("gate_first needs an activation that can be zero, and no off_F")
        first = first if gate_first is None else gate_first
        return self._masked(x_TD, mask_TE, residual_TD, first, config)

    def _masked(
        self,
        x_TD: Tensor,
        mask_TE: Tensor | None,
        residual_TD: Tensor | None,
        gate_first: bool,
        config: Config | None = None,
    ) -> Tensor:
        """Computes y_TD on the kernels from arguments that fit."""
        options = self._options(x_TD, {"mask_TE": mask_TE, "residual_TD": residual_TD}, config)
        with torch.no_grad():
            y_TD: Tensor = forward(
                flat(x_TD),
                mask_TE=None if mask_TE is None else flat(mask_TE),
                residual_TD=None if residual_TD is None else flat(residual_TD),
                **self._operands,
                **options,
                gate_first=gate_first,
                atomic=False,
            )
        return y_TD.view(x_TD.shape)

    def takes(self, x_TD: Tensor, scores: Scores) -> bool:
        """Whether `scored` can compute this, and the kernels are expected to be faster."""
        tokens = _tokens(x_TD)
        if isinstance(scores, LinearScores) and not fits(scores, self.weights.neurons, tokens):
            return False
        return self._pays(x_TD)

    def scored(
        self,
        x_TD: Tensor,
        scores: Scores,
        residual_TD: Tensor | None = None,
        *,
        config: Config | None = None,
    ) -> Tensor:
        """Computes y_TD of the experts that `scores` select, in as many launches as with a mask.

        Args:
            x_TD: any leading dimensions, which `scores` share.
            scores: a router's last product, or copies in few bits.
            residual_TD: is added to y.
            config: tile sizes; by default the fastest that are known.

        Raises:
            ValueError: as `run`; scores that do not fit.
        """
        self.check_call(x_TD, None, residual_TD)
        size = (self.weights.neurons, self.weights.width)
        misfit = scores.misfit(x_TD.shape[:-1], *size) or self._other_kind(scores)
        if misfit:
            raise ValueError(misfit)
        others = {"residual_TD": residual_TD, **scores.tensors()}
        options = self._options(x_TD, others, config)
        given = {
            **self._operands,
            "mask_TE": None,
            "residual_TD": None if residual_TD is None else flat(residual_TD),
        }
        with torch.no_grad():
            y_TD = _of_scores(flat(x_TD), scores, given, options)
        return y_TD.view(x_TD.shape)

    def _other_kind(self, scores: Scores) -> str | None:
        """Says that copies are of an FFN with a gate and this has none, or the other way round."""
        if isinstance(scores, FewBitScores) and (scores.up is None) == ("gate_FD" in self._rows):
            return "copies are of gate and up where the FFN has a gate, and else of up alone"
        return None

    def _run(self, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        return self._run_onto(x_TD, mask_TE, None)

    def _run_onto(self, x_TD: Tensor, mask_TE: Tensor | None, residual_TD: Tensor | None) -> Tensor:
        if self._pays(x_TD):
            return self._masked(x_TD, mask_TE, residual_TD, goes_gate_first(self.weights))
        with torch.no_grad():
            y_TD = sparse_ffn_reference(self._values(x_TD.dtype), x_TD, mask_TE)
        return y_TD if residual_TD is None else residual_TD + y_TD

    def _pays(self, x_TD: Tensor) -> bool:
        return not self._or_dense or self.limits.pays(_tokens(x_TD), self._share)

    def _options(
        self, x_TD: Tensor, others: dict[str, Tensor | None], config: Config | None
    ) -> dict[str, Any]:
        """The operator's options for an input.

        Raises:
            ValueError: it, or one of the `others`, is not what the kernels take.
        """
        refusal = f"x_TD is {x_TD.dtype}: the kernels take {_named(DTYPES)}"
        if x_TD.dtype in DTYPES:
            others = {"the packed weights": self._rows["up_FD"].stored, **others}
            # a graph cannot hold these checks, and the devices of its tensors do not change
            checks = not torch.compiler.is_compiling()
            refusal = (checks and (elsewhere(x_TD, others) or no_device(x_TD))) or ""
        if refusal:
            raise ValueError(refusal)
        config = config or self.limits.config(_tokens(x_TD))
        activations = activation_options(self.weights.act, self.weights.up_act)
        return {**activations, "config": [] if config is None else config.numbers}

    def _laid_out(self) -> dict[str, Tensor | None]:
        """The operator's tensors that stay; a plain FFN's one projection stands in `gate`."""
        inputs = ("gate_FD", "up_FD") if "gate_FD" in self._rows else ("up_FD",)
        slots: dict[str, Tensor | None] = {"off_F": self.weights.off_F}
        for slot, name in (*zip(("gate", "up"), inputs, strict=False), ("down", "down_FD")):
            slots[f"{slot}_FD"], slots[f"{slot}_scale_FG"], _ = self._rows[name]
        for slot, name in zip(("gate_F", "up_F"), inputs, strict=False):
            slots[slot] = getattr(self.weights, name.removesuffix("D"))
        off = self.weights.off_F is not None
        slots["down_D"] = constant_D(self._values(torch.float32)) if off else self.weights.down_D
        return {"up_FD": None, "up_scale_FG": None, "up_F": None, **slots}

    def _values(self, dtype: torch.dtype) -> FFNWeights:
        """The numbers that are stored, and the biases, in one dtype."""
        width = self.weights.width
        rows = {name: one.values_FD(width, dtype) for name, one in self._rows.items()}
        cast = self.weights.changed(lambda matrix: matrix, lambda bias: bias.to(dtype))
        return _with_rows(cast, rows)

    def _find_limits(self) -> limits.Limits:
        return limits_of(self.weights, self.device, self._dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickle with the limits of the card here."""
        self.__dict__.update(state)
        self.limits = self._find_limits()


def cannot_store(weights: FFNWeights, dtype: torch.dtype) -> str | None:
    """Says why `TritonFFN` cannot store these; None when it can."""
    if dtype not in NAMES:
        return f"backend 'triton' stores {_named(NAMES)}, not {dtype}"
    if not all(isinstance(act, Act) for _, _, act in weights.inputs):
        return UNNAMED
    return None


def limits_of(weights: FFNWeights, device: torch.device, dtype: torch.dtype) -> limits.Limits:
    """What is known of an FFN that is stored in `dtype` on a card."""
    kind: limits.Kind = "gate first" if goes_gate_first(weights) else "given"
    return limits.of(card(device), NAMES[dtype], kind, weights.width, weights.neurons)


def known(packed: TritonFFN) -> tuple[str, bool]:
    """The card that holds an FFN, and whether an FFN like it was measured there."""
    return card(packed.device), bool(packed.limits.entries)


def pays(weights: FFNWeights, x_TD: Tensor) -> bool:
    """Whether the kernels are expected to be faster, at `ASSUMED` of the neurons a token."""
    return limits_of(weights, x_TD.device, x_TD.dtype).pays(_tokens(x_TD), ASSUMED)


def card(device: torch.device) -> str:
    """The name of a card, as the table of limits has it; that of any other device is its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _of_scores(
    x_TD: Tensor, scores: Scores, given: dict[str, Tensor | None], options: dict[str, Any]
) -> Tensor:
    """Calls the operator of a kind of scores."""
    made: Tensor
    if isinstance(scores, FewBitScores):
        gate, up = scores.gate, scores.up
        made = proposed(
            x_TD,
            **given,
            z_TD=flat(scores.z_TD),
            gate_copy_FP=gate.stored,
            gate_copy_scale_FG=gate.scale_FG,
            up_copy_FP=None if up is None else up.stored,
            up_copy_scale_FG=None if up is None else up.scale_FG,
            norm_F=scores.norm_F,
            above=scores.above,
            offset=gate.offset,
            **options,
        )
        return made
    made = routed(
        x_TD,
        **given,
        z_TK=flat(scores.z_TK),
        weight_RK=scores.weight_RK.contiguous(),
        bias_R=None if scores.bias_R is None else scores.bias_R.contiguous(),
        above=scores.above,
        shared=scores.shared,
        **options,
    )
    return made


def _with_rows(weights: FFNWeights, rows: dict[str, Tensor]) -> FFNWeights:
    up_FD, down_FD, gate_FD = rows["up_FD"], rows["down_FD"], rows.get("gate_FD")
    return replace(weights, up_FD=up_FD, down_FD=down_FD, gate_FD=gate_FD)


def _tokens(x_TD: Tensor) -> int:
    return x_TD.shape[:-1].numel()


def _shape(matrix: Tensor) -> Tensor:
    """The shape and the dtype of a matrix, without its numbers."""
    return matrix.detach().to("meta")


def _named(dtypes: Any) -> str:
    *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(most)} or {last}"
