"""The weights of one FFN, a neuron a row, and its formula.

Letters: T tokens, D width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from moe_tools.kernels.activations import Act, ActivationLike, named


@dataclass(frozen=True)
class FFNWeights:
    """An FFN: y = h down, where h = act(gate x) * up_act(up x), or act(up x) without a gate.

    Raises:
        ValueError: shapes that do not fit, or an `up_act` or gate bias without a gate.
    """

    up_FD: Tensor
    down_FD: Tensor
    """W_down transposed, so that a neuron is one row of each matrix."""
    act: ActivationLike
    gate_FD: Tensor | None = None
    up_F: Tensor | None = None
    gate_F: Tensor | None = None
    down_D: Tensor | None = None
    """The three biases; that of the output is added once, whatever is off."""
    up_act: ActivationLike = "identity"
    """relu makes the FFN that of dReLU (TurboSparse, arXiv 2406.05955)."""
    off_F: Tensor | None = None
    """The value of h for a neuron that a mask turns off, a constant; None is zero."""

    def __post_init__(self) -> None:
        if self.up_FD.ndim != 2 or 0 in self.up_FD.shape:
            raise ValueError(f"up_FD is {tuple(self.up_FD.shape)}; weights are (neurons, width)")
        for name, tensor in (("down_FD", self.down_FD), ("gate_FD", self.gate_FD)):
            if tensor is not None and tensor.shape != self.up_FD.shape:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)}; up_FD is {tuple(self.up_FD.shape)}"
                )
        for name, bias, size in (
            ("up_F", self.up_F, self.neurons),
            ("gate_F", self.gate_F, self.neurons),
            ("off_F", self.off_F, self.neurons),
            ("down_D", self.down_D, self.width),
        ):
            if bias is not None and bias.shape != (size,):
                raise ValueError(f"{name} is {tuple(bias.shape)}; this bias has {size} numbers")
        if self.gate_FD is None and (
            self.gate_F is not None or named(self.up_act) != Act("identity")
        ):
            raise ValueError("gate_F and up_act belong to an FFN with a gate: give gate_FD")

    @property
    def neurons(self) -> int:
        """The number of neurons, F."""
        return self.up_FD.shape[0]

    @property
    def width(self) -> int:
        """The width of the model, D."""
        return self.up_FD.shape[1]

    @property
    def inputs(self) -> list[tuple[Tensor, Tensor | None, Act | Callable[[Tensor], Tensor]]]:
        """The projections of x in the order in which they are read: (rows, bias, activation)."""
        if self.gate_FD is None:
            return [(self.up_FD, self.up_F, named(self.act))]
        return [
            (self.gate_FD, self.gate_F, named(self.act)),
            (self.up_FD, self.up_F, named(self.up_act)),
        ]

    def matrices(self) -> Iterator[Tensor]:
        """Yields gate (if any), up and down."""
        for tensor in (self.gate_FD, self.up_FD, self.down_FD):
            if tensor is not None:
                yield tensor

    def per_neuron(self) -> Iterator[Tensor]:
        """Yields every weight and bias whose first dimension is the neuron."""
        for tensor in (*self.matrices(), self.gate_F, self.up_F):
            if tensor is not None:
                yield tensor

    @property
    def row_numbers(self) -> int:
        """The number of weights that are read to compute h of one neuron."""
        return self.width * len(self.inputs)

    @property
    def routing_FD(self) -> Tensor:
        """The rows that decide when a neuron fires: gate rows when gated, else up rows."""
        return self.up_FD if self.gate_FD is None else self.gate_FD

    @property
    def down_norm_F(self) -> Tensor:
        """The norm of each column of W_down, in fp32: how far one unit of h moves the output."""
        return self.down_FD.detach().float().norm(dim=1)

    @property
    def requires_grad(self) -> bool:
        """Whether one of the tensors asks for a gradient."""
        biases = (self.up_F, self.gate_F, self.down_D)
        tensors = (self.up_FD, self.down_FD, self.gate_FD, *biases)
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def rows(self, neurons: slice) -> FFNWeights:
        """Returns the FFN of these neurons alone, as views."""

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[neurons]

        return replace(
            self,
            up_FD=self.up_FD[neurons],
            down_FD=self.down_FD[neurons],
            gate_FD=some(self.gate_FD),
            up_F=some(self.up_F),
            gate_F=some(self.gate_F),
            off_F=some(self.off_F),
        )

    def changed(
        self, matrix: Callable[[Tensor], Tensor], bias: Callable[[Tensor], Tensor]
    ) -> FFNWeights:
        """Returns the FFN with `matrix` applied to each matrix and `bias` to each bias."""
        return replace(
            self,
            up_FD=matrix(self.up_FD),
            down_FD=matrix(self.down_FD),
            gate_FD=None if self.gate_FD is None else matrix(self.gate_FD),
            up_F=None if self.up_F is None else bias(self.up_F),
            gate_F=None if self.gate_F is None else bias(self.gate_F),
            down_D=None if self.down_D is None else bias(self.down_D),
            off_F=None if self.off_F is None else bias(self.off_F),
        )

    def check_call(self, x_TD: Tensor, mask_TE: Tensor | None) -> None:
        """Checks that x and a mask fit.

        Raises:
            ValueError: they do not.
        """
        if x_TD.shape[-1:] != (self.width,):
            raise ValueError(f"x_TD is {tuple(x_TD.shape)}; the weights have width {self.width}")
        if mask_TE is None:
            return
        if mask_TE.ndim != x_TD.ndim or mask_TE.shape[:-1] != x_TD.shape[:-1]:
            raise ValueError(f"mask_TE is {tuple(mask_TE.shape)}; x_TD is {tuple(x_TD.shape)}")
        experts = mask_TE.shape[-1]
        if not 1 <= experts <= self.neurons:
            raise ValueError(f"{self.neurons} neurons cannot make {experts} experts")
