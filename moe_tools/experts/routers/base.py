"""What a router is. Letters: T tokens, D model width, F neurons, R experts that are routed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from moe_tools.experts.importance import Importance
from moe_tools.hosts.ffn import FFN
from moe_tools.hosts.projections import Projections
from moe_tools.kernels.cpu.linear import CpuLinear, own_rows
from moe_tools.kernels.scores import LinearScores, Scores
from moe_tools.kernels.sparse_ffn import native_cpu

Start = Literal["regression", "open"]
"""How a router that can be fitted in closed form begins: fitted, or with every expert on."""


@dataclass(frozen=True)
class Scoring:
    """What it takes to score one token, in a kernel that reads and computes nothing twice."""

    flops: float
    """Matrix FLOPs in floating point."""
    bits: float
    """Bits of weights read from memory."""
    few_bit_ops: float = 0.0
    """Multiplies and adds of whole numbers of 8 bits and fewer; a word of 32 signs counts as 4."""
    known_flops: float = 0.0
    """FLOPs of one neuron that are done once it is scored: it need not be computed again."""
    known_bits: float = 0.0
    """Bits of one neuron that are read once it is scored."""
    known_of: Literal["neuron", "expert"] = "neuron"
    """What that holds of: every neuron of the FFN, or one neuron of each routed expert."""


class Starter(ABC):
    """Watches a dense FFN on calibration text, then starts the router that was made from it."""

    @abstractmethod
    def add(self, x_TD: Tensor, h_TF: Tensor) -> None:
        """Sees the input and the hidden activations of one batch."""

    @abstractmethod
    def apply(self, router: Router) -> None:
        """Starts the router, whose class made this starter."""


class Router(nn.Module, ABC):
    """Scores every routed expert from the FFN's input, in fp32 under any dtype."""

    ratio_scale: bool = True
    """Scores are 0 or more, and twice the score means twice the expert: shares make sense."""
    reads_rows: bool = False
    """Scores with the weights of the FFN itself, which then have to stay where they are."""
    zero_below: float = 0.0
    """What its experts are predicted to be: see `Importance.nonzero_TR`."""

    @property
    def needs_zeros(self) -> bool:
        """Whether it predicts which neurons are exactly 0, and is of no use where none is."""
        return False

    def scores(self, x_TD: Tensor, above: float, shared: int) -> Scores | None:
        """What a kernel needs to find the experts above a score by itself; None: it cannot.

        Args:
            x_TD: the FFN's input.
            above: the score, not included.
            shared: experts in front of those that are scored, which always run.
        """
        return None

    def above_TR(self, x_TD: Tensor, tau: float) -> Tensor | None:
        """The mask of scores above tau, where that is to be had without the scores; None: not."""
        return None

    @classmethod
    @abstractmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """Builds a fresh router for an FFN and its experts; options go to the class by name."""

    @classmethod
    def starter(cls, start: Start, sparsity: float) -> Callable[[Importance], Starter] | None:
        """What starts a router of this kind from activations; None: it is complete as it is built.

        Args:
            start: see `Start`; kinds that are started in one way only do not ask.
            sparsity: share of the experts that are off after a start by regression.

        Returns:
            A function that makes the starter of one FFN from the importance of its experts.
        """
        return None

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """What is added to the logits of the scores, one number an expert; None: there is none.

        A train step shifts it to reach a sparsity (`moe_tools.experts.line`).
        """
        return None

    @abstractmethod
    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR."""

    @abstractmethod
    def flops(self) -> int:
        """Matrix FLOPs of scoring one token, in floating point."""

    def scoring(self, weight_bits: int | None = None) -> Scoring:
        """What it takes to score one token: its own numbers, in bf16, unless a kind reads others.

        Args:
            weight_bits: 8 or 4: how the FFN's own weights are stored; None: in bf16.
        """
        numbers = sum(tensor.numel() for tensor in (*self.parameters(), *self.buffers()))
        return Scoring(self.flops(), bits=16 * numbers)


class RowReader(Router):
    """Scores from the FFN's own weights, whatever they are by then; it has none of its own."""

    reads_rows = True

    def __init__(self, ffn: FFN, importance: Importance) -> None:
        super().__init__()
        self.ffn = ffn
        """Where the rows are; `ExpertFFN` makes it itself, so that adapters are seen."""
        self.division, self.shared = importance.division, importance.shared

    @classmethod
    def build(cls, ffn: FFN, importance: Importance, **options: Any) -> Self:
        """For an FFN and its experts; there are no options."""
        return cls(ffn, importance, **options)

    @property
    def projections(self) -> Projections:
        """The FFN's modules, as they are now."""
        return self.ffn.projections


class LearnedRouter(Router):
    """A router that the `fit` step trains on the donor's activations, one FFN at a time."""

    target_dtype: torch.dtype = torch.bfloat16
    """How targets are stored on disk: labels need no more than the three digits of bf16."""

    @abstractmethod
    def target_TR(self, h_TF: Tensor, importance: Importance) -> Tensor:
        """What this kind learns to predict from the donor's hidden activations."""

    @abstractmethod
    def loss(self, x_TD: Tensor, target_TR: Tensor) -> Tensor:
        """How far the predictions are from the targets: a scalar."""

    def prepare(self, target_TR: Tensor) -> None:
        """Sees all targets once, in `target_dtype` and maybe on disk, before the training."""
        del target_TR


class LabelRouter(LearnedRouter):
    """Scores in (0, 1) that learn labels in [0, 1] by binary cross entropy.

    The label is the share of the token's largest magnitude (MoEfication, arXiv 2110.01786), unless
    a kind says otherwise.
    """

    positive_weight: float = 1.0
    """What a label of 1 counts for in the loss, where a label of 0 counts for 1."""

    @property
    def last(self) -> ProductFP32 | None:
        """The product whose results are the logits; None: a kind computes these in its own way."""
        return None

    def enters_last_TK(self, x_TD: Tensor) -> Tensor:
        """What the last product takes: x itself, or what comes before makes of it."""
        return x_TD

    def logits_TR(self, x_TD: Tensor) -> Tensor:
        """Scores before the sigmoid, in fp32."""
        assert self.last is not None
        with in_fp32(x_TD):
            return self.last.product_TN(self.enters_last_TK(x_TD))

    def scores(self, x_TD: Tensor, above: float, shared: int) -> Scores | None:
        """Its last product, where that is all that is left to do."""
        kind, last = type(self), self.last
        if last is None or kind.logits_TR is not LabelRouter.logits_TR:
            return None
        if kind.forward is not LabelRouter.forward:
            return None
        with in_fp32(x_TD):
            z_TK = self.enters_last_TK(x_TD)
        return LinearScores(z_TK, last.weight, last.bias, above, shared)

    def forward(self, x_TD: Tensor) -> Tensor:
        """scores_TR in (0, 1)."""
        return torch.sigmoid(self.logits_TR(x_TD))

    def target_TR(self, h_TF: Tensor, importance: Importance) -> Tensor:
        """The experts' magnitudes."""
        return importance.magnitude_TR(h_TF)

    def label_TR(self, target_TR: Tensor) -> Tensor:
        """target / max over the experts."""
        return target_TR / target_TR.amax(-1, keepdim=True).clamp_min(1e-12)

    def loss(self, x_TD: Tensor, target_TR: Tensor) -> Tensor:
        """Binary cross entropy with the labels, weighed, and averaged over tokens and experts."""
        logits_TR = self.logits_TR(x_TD)
        weight = logits_TR.new_tensor(self.positive_weight)
        return nn.functional.binary_cross_entropy_with_logits(
            logits_TR, self.label_TR(target_TR), pos_weight=weight
        )


class ProductFP32(nn.Module):
    """Has a weight and a bias, and computes x W^T + b in fp32 whatever their dtype.

    Casting a model to bf16 or fp16, as DeepSpeed does, then rounds a router's weights and not its
    arithmetic. No nn.Linear, or what quantises or adapts every linear of a model would take it.
    """

    weight: Tensor
    bias: nn.Parameter | None
    packed: CpuLinear | None = None

    def product_TN(self, x_TD: Tensor) -> Tensor:
        """x W^T + b, in fp32."""
        bias_N = None if self.bias is None else self.bias.float()
        if self.packed is None or not self.is_packed():
            return nn.functional.linear(x_TD.float(), self.weight.float(), bias_N)
        y_TN = self.packed(x_TD.float())
        return y_TN if bias_N is None else y_TN + bias_N

    def pack(self) -> None:
        """Lets the native kernels read the weight, where they can read it in its own dtype.

        It then lies where they read it, and has no gradients.
        """
        if own_rows(self.weight) and native_cpu():
            self.packed = CpuLinear(self.weight, None, self.weight.dtype)
            self.weight.data = self.packed.weight_ND()

    def is_packed(self) -> bool:
        """Whether the weight still lies where the kernels read it."""
        if torch.compiler.is_compiling():
            return True
        rows_NB = cast("CpuLinear", self.packed).rows_NB
        return self.weight.data_ptr() == rows_NB.data_ptr()

    def _apply(self, *args: Any, **options: Any) -> Any:
        """Packs the weight anew where it is cast or moved."""
        applied: Any = super()._apply
        made = applied(*args, **options)
        if self.packed is not None and not self.is_packed():
            self.packed = None
            self.pack()
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what the kernels read: the weight says it as well."""
        return {**self.__dict__, "packed": None, "was_packed": self.packed is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Packs the weight anew where it was packed."""
        was_packed = state.pop("was_packed", False)
        nn.Module.__setstate__(self, state)
        if was_packed:
            self.pack()


class LinearFP32(ProductFP32):
    """A linear that computes in fp32; it starts as nn.Linear does."""

    def __init__(self, width: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        start = nn.Linear(width, outputs, bias=bias)
        self.weight, self.bias = start.weight, start.bias

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, outputs) in fp32."""
        return self.product_TN(x_TD)


def matrix_flops(*matrices: Tensor) -> int:
    """A multiply and an add for each weight."""
    return 2 * sum(matrix.numel() for matrix in matrices)


def in_fp32(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off: a router's scores decide, and bf16 would make ties of them."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
