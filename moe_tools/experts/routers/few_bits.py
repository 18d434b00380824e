"""Proposes single neurons from copies of their rows in few bits; the exact rows then compute.

The score of a neuron is how far it is expected to move the output, |h~| ||w_down||, where h~ is the
host's own formula on rows of two to eight bits: the product of gate and up decides, and few bits
know it (Prox, arXiv 2607.27591, with one norm more). Nothing is trained. The copies are made from
the weights whenever these change, and never stored; norms and the inputs' second moments are, for
they belong to the weights from before any `refit` or training.

Letters: T tokens, D model width, F neurons, R experts that are routed, K inputs that are read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from moe_tools.experts.importance import Importance
from moe_tools.experts.routers.base import Router, RowReader, Scoring, Start, Starter
from moe_tools.hosts.activations import kernel_act, kernel_up_act
from moe_tools.hosts.ffn import FFN
from moe_tools.hosts.linears import tensors_of
from moe_tools.hosts.projections import hidden_TF
from moe_tools.kernels.activations import Act
from moe_tools.kernels.cpu.linear import CpuLinear
from moe_tools.kernels.cpu.proposal import CpuProposal
from moe_tools.kernels.few_bits import (
    GROUP,
    CopyBits,
    FewBits,
    StoredBits,
    bits_each,
    copy_rows,
    group_int8,
    store_rows,
)
from moe_tools.kernels.scores import FewBitScores, Scores
from moe_tools.kernels.sparse_ffn import native_cpu
from moe_tools.kernels.triton.stored import of_codes

OFF_GRID = 0.15
"""Steps of the grid, root mean square: bf16 moves stored weights by 0.05, others lie 0.29 off."""

Product = Callable[[Tensor], Tensor]
"""From x_TD to its products with all rows of one matrix, (T, F)."""
Products = tuple[Product, Product | None]
"""With the up rows and, where there is a gate, the gate rows, as the few bits have them."""


class FewBitsRouter(RowReader):
    """|h~| ||w_down|| of single neurons; of larger experts the root of the sum of squares.

    Scores have no gradient. In training the copies are made again in every pass: weights may be
    changed behind PyTorch's back there (DeepSpeed writes to `.data`).
    """

    norm_F: Tensor
    moment_D: Tensor

    def __init__(
        self,
        ffn: FFN,
        importance: Importance,
        bits: int = 4,
        of: int | None = None,
        x_bits: int | None = None,
        inputs: float = 1.0,
    ) -> None:
        """Proposes with rows of `bits` bits.

        Args:
            ffn: the FFN.
            importance: its experts.
            bits: 2, 3, 4 or 8.
            of: 8 or 4: the copies are the high bits of weights that `quantize` stored in so many,
                and the exact pass reads their low bits alone; None: copies beside the weights.
            x_bits: 8: the input is rounded, too, as integer products need it; None: it is not.
            inputs: share of a token's inputs that the proposal reads, the largest ones.

        Raises:
            ValueError: bits that cannot be, a share outside (0, 1], or weights that lie on no grid
                of `of` bits.
        """
        super().__init__(ffn, importance)
        _check(bits, of, x_bits, inputs)
        self.bits, self.of, self.x_bits, self.inputs = bits, of, x_bits, inputs
        self.register_buffer("norm_F", importance.down_FD.detach().float().norm(dim=1))
        self.register_buffer(
            "moment_D", importance.down_FD.new_ones(ffn.width, dtype=torch.float32)
        )
        self._made: tuple[object, Products] | None = None
        self._packed: Products | None = None
        self.proposal: CpuProposal | None = None
        """What says in one call which neurons are above a threshold, once it is packed."""
        if of is not None:
            _check_stored(ffn, cast(StoredBits, of))

    @classmethod
    def starter(cls, start: Start, sparsity: float) -> Callable[[Importance], Starter] | None:
        """Calibration text gives the inputs' second moments, however other kinds start."""
        return Moments

    @torch.no_grad()
    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR, 0 or more, in fp32."""
        size_TF = self.proposed_TF(x_TD).float().abs_().mul_(self.norm_F)
        if self.division.of_neurons:
            return size_TF[..., self.shared :]
        return self.division.sum_TE(size_TF.square_())[..., self.shared :].sqrt()

    def proposed_TF(self, x_TD: Tensor) -> Tensor:
        """h~_TF, in the dtype of x."""
        x_TD = self._read(x_TD)
        up, gate = self._packed or self._products(x_TD.dtype)
        return hidden_TF(self.projections.act, up(x_TD), None if gate is None else gate(x_TD))

    def _read(self, x_TD: Tensor) -> Tensor:
        """What the proposal reads of x."""
        if self.x_bits is not None:
            x_TD = group_int8(x_TD)
        return _largest(x_TD, self.inputs) if self.inputs < 1 else x_TD

    def pack(self, backend: str) -> None:
        """Takes the copies once, in int4: the FFN's own rows can then be freed.

        The CPU's kernel rounds x to int8, as `x_bits: 8` does.

        Args:
            backend: that of the FFN, whose kernels read them.
        """
        if backend != "cpu":
            self._packed = self._made_of(_Laid)
            return
        self._packed = self._made_of(CpuLinear.of_codes)
        up, gate = self._packed
        act = kernel_act(self.projections.act)
        if act is None or self.inputs < 1 or not self.division.of_neurons or self.shared:
            return
        up_act = Act(kernel_up_act(self.projections.act))
        linears = cast("CpuLinear", up), cast("CpuLinear | None", gate)
        self.proposal = CpuProposal(*linears, act, up_act, self.norm_F)

    def above_TR(self, x_TD: Tensor, tau: float) -> Tensor | None:
        """In one call of the kernels, once it is packed."""
        return None if self.proposal is None else self.proposal(x_TD, tau)

    def scores(self, x_TD: Tensor, above: float, shared: int) -> Scores | None:
        """The copies, where a neuron is an expert and they are laid out for the Triton kernels."""
        up, gate = self._packed or (None, None)
        if not isinstance(up, _Laid) or not self.division.of_neurons or shared:
            return None
        first = up.rows if gate is None else cast("_Laid", gate).rows
        second = None if gate is None else up.rows
        return FewBitScores(self._read(x_TD), first, second, self.norm_F, above)

    def cannot_pack(self, backend: str) -> str | None:
        """Why `pack` cannot be called; None: it can."""
        if backend == "triton":
            return None
        rows_FD = self.projections.weights().up_FD
        if self.bits > 4:
            return f"proposals in {self.bits} bits: there is no kernel for them, take 4 or fewer"
        if rows_FD.device.type != "cpu" or not native_cpu():
            return (
                f"proposals in few bits on {rows_FD.device}: only native CPU kernels and Triton "
                "read them"
            )
        return None

    def few_bits(self, rows_FD: Tensor) -> FewBits:
        """The copy of some rows: of their own, or the high bits of what is stored."""
        if self.of is None:
            return copy_rows(rows_FD, cast(CopyBits, self.bits), self.moment_D)
        return store_rows(rows_FD, cast(StoredBits, self.of)).high_bits(self.bits)

    def scoring(self, weight_bits: int | None = None) -> Scoring:
        """The copies of the rows; of stored rows their high bits, which are then known."""
        neurons, row = self.division.neurons, self.projections.weights().row_numbers
        each = bits_each(self.bits)
        return Scoring(
            flops=0.0,
            bits=neurons * (row * self.inputs * each + 16),  # 16: the norm
            few_bit_ops=2 * neurons * row * self.inputs,
            known_bits=0.0 if self.of is None else row * self.inputs * each,
        )

    def flops(self) -> int:
        """None in floating point: see `scoring`."""
        return 0

    def train(self, mode: bool = True) -> FewBitsRouter:
        """Forgets the copies, too: training changes what they are made of."""
        self._made = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of this router makes its own copies of the rows."""
        return {**self.__dict__, "_made": None}

    def _products(self, dtype: torch.dtype) -> Products:
        """Made once for weights that stay as they are."""
        state = None if self.training else (dtype, self._state())
        if state is None:
            return self._made_of(partial(_Plain, dtype=dtype))
        if self._made is None or self._made[0] != state:
            self._made = (state, self._made_of(partial(_Plain, dtype=dtype)))
        return self._made[1]

    def _made_of(self, product: Callable[[FewBits, Tensor | None], Product]) -> Products:
        """What multiplies by the copies, and adds the biases, which are exact."""
        weights = self.projections.computed()
        up = product(self.few_bits(weights.up_FD), weights.up_F)
        if weights.gate_FD is None:
            return up, None
        return up, product(self.few_bits(weights.gate_FD), weights.gate_F)

    def _state(self) -> list[tuple[int, int]]:
        """Tells whether a weight, or an adapter of it, is another one or was changed in place."""
        found = [self.moment_D]
        for linear in self.projections.linears():
            found += [*tensors_of(linear), *linear.parameters()]
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in found]


class Moments(Starter):
    """The second moments of an FFN's inputs, which say where the error of a weight counts."""

    def __init__(self, importance: Importance) -> None:
        self.sum_D = importance.down_FD.new_zeros(importance.down_FD.shape[1], dtype=torch.float32)
        self.tokens = 0

    def add(self, x_TD: Tensor, h_TF: Tensor) -> None:
        """Sums x^2 over the tokens of a batch."""
        self.sum_D += x_TD.float().square().sum(0)
        self.tokens += len(x_TD)

    def apply(self, router: Router) -> None:
        """Gives them to the router."""
        assert isinstance(router, FewBitsRouter)
        router.moment_D.copy_(self.sum_D / self.tokens)


def _check(bits: int, of: int | None, x_bits: int | None, inputs: float) -> None:
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"few_bits: bits is {bits!r}, but must be 2, 3, 4 or 8")
    if of not in (None, 4, 8):
        raise ValueError(f"few_bits: of is {of!r}, but weights are stored in 8 or 4 bits, or null")
    if of is not None and bits >= of:
        raise ValueError(f"few_bits: the high {bits} of {of} bits save nothing: fewer bits, please")
    if x_bits not in (None, 8):
        raise ValueError(f"few_bits: x_bits is {x_bits!r}, but must be 8 or null")
    if not 0 < inputs <= 1:
        raise ValueError(f"few_bits: inputs is {inputs!r}, but must be a share in (0, 1]")


def _check_stored(ffn: FFN, bits: StoredBits) -> None:
    """Whether an FFN's rows lie on a grid of so many bits; shapes without numbers do."""
    for rows_FD, _, _ in ffn.weights().inputs:
        if rows_FD.is_meta:
            return
        stored = store_rows(rows_FD, bits)
        step_FD = stored.scale_FG.float().repeat_interleave(GROUP, 1)[:, : rows_FD.shape[1]]
        missed = ((rows_FD.float() - stored.values_FD()) / step_FD).square().mean().sqrt()
        if missed > OFF_GRID:
            raise ValueError(
                f"{ffn.name} is not stored in {bits} bits, whose high bits few_bits should read: "
                f"put `quantize: {{bits: {bits}}}` before it, or leave `of` out"
            )


def _largest(x_TD: Tensor, share: float) -> Tensor:
    """x with the share of the largest numbers of each token, and 0 elsewhere."""
    kept = max(1, round(share * x_TD.shape[-1]))
    index_TK = x_TD.abs().topk(kept, dim=-1).indices
    return torch.zeros_like(x_TD).scatter(-1, index_TK, x_TD.gather(-1, index_TK))


class _Laid:
    """A product with copies as the Triton kernels read them, for when these do not compute it."""

    def __init__(self, few: FewBits, bias_F: Tensor | None) -> None:
        self.rows, self.width = of_codes(few), few.codes_FD.shape[1]
        self.bias_F = bias_F

    def __call__(self, x_TD: Tensor) -> Tensor:
        """x W~^T + b; the numbers are made of the codes each time."""
        bias_F = None if self.bias_F is None else self.bias_F.to(x_TD.dtype)
        return nn.functional.linear(x_TD, self.rows.values_FD(self.width, x_TD.dtype), bias_F)


class _Plain:
    """A product and a bias in PyTorch."""

    def __init__(self, few: FewBits, bias_F: Tensor | None, dtype: torch.dtype) -> None:
        self.rows_FD = few.values_FD(dtype)
        self.bias_F = None if bias_F is None else bias_F.to(dtype)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """x W~^T + b."""
        return nn.functional.linear(x_TD, self.rows_FD, self.bias_F)
