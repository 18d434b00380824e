"""One case, computed by the kernels and by the reference, and what they differ in.

The reference computes in fp64, on the same device and from the same numbers: what differs is the
kernels' own rounding.

Letters: T tokens, D model width, F neurons, E experts, K experts of one token, X experts of a host,
N neurons of one of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moe_tools.kernels.activations import GIVES_ZEROS, Act, ActName, named
from moe_tools.kernels.few_bits import GROUP
from moe_tools.kernels.moe import ExpertWeights, moe_ffn
from moe_tools.kernels.reference import sparse_ffn_reference
from moe_tools.kernels.scores import LinearScores
from moe_tools.kernels.sparse_ffn import pack
from moe_tools.kernels.triton.ffn import sparse_ffn_triton
from moe_tools.kernels.triton.moe import moe_ffn_triton
from moe_tools.kernels.weights import FFNWeights
from tools.gpu.cases import FEW_BITS, FLOATS, REAL, ROUTES, Case

LIMITS = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}
"""The largest error, relative to the largest element, by the dtype of x."""
MARGIN = 1e-5
"""No number that meets a kink of an activation lies nearer to it: fp32 and fp64 then agree."""

Made = dict[str, Tensor]
"""y and gradients, by name."""


def check(case: Case, device: str) -> dict[str, Any]:
    """Compares a case with the reference, with itself, and on a card in a graph and two streams.

    Returns:
        The row: `error` relative to the largest element, `of` the tensor where it is, and what
        else is wrong.
    """
    call = Call(case, device)
    first = call.ours()
    error, of = worst(first, call.reference())
    limit = LIMITS[case.x_dtype]
    wrong = [] if error <= limit else [f"{of} is off by {error:.1e} of its largest element"]
    if not ROUTES[case.route].atomic:
        again = [call.ours() for _ in range(2)]
        if any(not same(first, made) for made in again):
            wrong.append("three runs differ")
        if device == "cuda":
            wrong += _on_the_card(call, first["y_TD"])
    return {
        "case": case.name,
        "route": case.route,
        "dtype": case.dtype,
        "error": error,
        "of": of,
        "limit": limit,
        "wrong": "; ".join(wrong),
    }


def worst(ours: Made, theirs: Made) -> tuple[float, str]:
    """Returns the largest error, relative to the largest element of its tensor, and its name."""
    errors = {}
    for name, expected in theirs.items():
        largest = float(expected.abs().max()) or 1.0
        error = float((ours[name].double() - expected).abs().max()) / largest
        errors[name] = error if error == error else float("inf")
    of = max(errors, key=lambda name: errors[name])
    return errors[of], of


def same(some: Made, others: Made) -> bool:
    """Whether all bits are."""
    return all(torch.equal(tensor, others[name]) for name, tensor in some.items())


@torch.no_grad()
def _on_the_card(call: Call, y_TD: Tensor) -> list[str]:
    """Says what a CUDA graph, and two streams at once, do not compute as one call does."""
    from moe_tools.bench.cuda import capture

    made: list[Tensor] = []
    graph = capture([lambda: made.append(call.y_TD())])
    for _ in range(2):
        made[-1].zero_()
        graph.replay()
    wrong = [] if torch.equal(made[-1], y_TD) else ["a CUDA graph differs"]
    streams = [torch.cuda.Stream() for _ in range(2)]
    at_once: list[Tensor] = []
    torch.cuda.synchronize()
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            at_once.append(call.y_TD())
    torch.cuda.synchronize()
    if any(not torch.equal(one, y_TD) for one in at_once):
        wrong.append("two streams differ")
    return wrong


class Call:
    """The operands of a case, drawn by its name, and both ways to compute it."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.route, self.device = case, ROUTES[case.route], device
        self.draw = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))
        width, _, _ = case.shape
        while True:
            self.operands = self._host() if case.host else self._ffn()
            self.operands["x_TD"] = self._normal(case.tokens, width).to(FLOATS[case.x_dtype])
            decided = self.route.mask == "router"
            if not (case.learns or decided) or self._clear_of_kinks():
                break
        if case.learns:
            for tensor in self.operands.values():
                if tensor.dtype.is_floating_point:
                    tensor.requires_grad_()
        self.dy_TD = self._normal(case.tokens, width).to(FLOATS[case.x_dtype])
        self.packed: Any = None
        if case.packs:
            stored = FEW_BITS.get(case.dtype)
            self.packed = pack(self.weights(), dtype=stored, backend="triton")

    def weights(self, operands: Made | None = None) -> FFNWeights:
        """The FFN of some operands, by default our own."""
        known = {"up_FD", "down_FD", "gate_FD", "up_F", "gate_F", "down_D"}
        found = {k: v for k, v in (operands or self.operands).items() if k in known}
        up_act: ActName = self.route.up_act if self.case.gated else "identity"
        return FFNWeights(act=self.route.act, up_act=up_act, **found)

    def y_TD(self) -> Tensor:
        """By the kernels."""
        one = self.operands
        if self.case.host:
            return moe_ffn_triton(self._experts(one), one["x_TD"], self.chosen_TK, one["weight_TK"])
        if self.route.mask == "router":
            return self.packed.scored(one["x_TD"], self._scores())
        mask_TE = one.get("mask_TE")
        if self.packed is not None:
            return self.packed(one["x_TD"], mask_TE)
        return sparse_ffn_triton(self.weights(), one["x_TD"], mask_TE, atomic=self.route.atomic)

    def ours(self) -> Made:
        """y and, where they are asked for, all gradients, by the kernels."""
        with torch.set_grad_enabled(self.case.learns):
            return self._with_gradients(self.y_TD(), self.operands, self.dy_TD)

    def reference(self) -> Made:
        """The same by the reference, in fp64; a mask has no gradient where it is off."""
        wide = {
            name: tensor.detach().double().requires_grad_(tensor.requires_grad)
            if tensor.dtype.is_floating_point
            else tensor
            for name, tensor in self.operands.items()
        }
        with torch.set_grad_enabled(self.case.learns):
            if self.case.host:
                routing = (self.chosen_TK, wide["weight_TK"])
                y_TD = moe_ffn(self._experts(wide), wide["x_TD"], *routing, backend="reference")
            else:
                mask_TE = self._logits_TE() > 0 if "router_ED" in wide else wide.get("mask_TE")
                y_TD = sparse_ffn_reference(self.weights(wide), wide["x_TD"], mask_TE)
            made = self._with_gradients(y_TD, wide, self.dy_TD.double())
        if "mask_TE" in made:
            made["mask_TE"] = made["mask_TE"] * (wide["mask_TE"] != 0)
        return made

    def _with_gradients(self, y_TD: Tensor, operands: Made, dy_TD: Tensor) -> Made:
        wanted = {name: tensor for name, tensor in operands.items() if tensor.requires_grad}
        made = {"y_TD": y_TD.detach()}
        if wanted:
            found = torch.autograd.grad(y_TD, list(wanted.values()), dy_TD)
            made |= dict(zip(wanted, found, strict=True))
        return made

    def _ffn(self) -> Made:
        """Weights; biases at odd shapes; a mask that half of the experts or neurons pass."""
        (width, experts, neurons), case = self.case.shape, self.case
        names = ["up_FD", "down_FD", *(["gate_FD"] if case.gated else [])]
        made = {name: self._rows(neurons, width) for name in names}
        if case.shape not in REAL:
            biases = {"up_F": neurons, "down_D": width} | (
                {"gate_F": neurons} if case.gated else {}
            )
            made |= {
                name: self._normal(size).to(made["up_FD"].dtype) for name, size in biases.items()
            }
        if self.route.mask == "experts":
            soft_TE = torch.rand(case.tokens, experts, generator=self.draw, device=self.device)
            made["mask_TE"] = torch.where(soft_TE < 0.5, 0.0, soft_TE)
        elif self.route.mask == "router":
            made["router_ED"] = self._normal(experts, width).to(FLOATS[case.x_dtype]) / width**0.5
            made["router_E"] = self._normal(experts).to(FLOATS[case.x_dtype])
        elif self.route.mask == "neurons":
            chance_TF = torch.rand(case.tokens, neurons, generator=self.draw, device=self.device)
            made["mask_TE"] = chance_TF < 0.5
        return made

    def _host(self) -> Made:
        (width, experts, neurons), tokens = self.case.shape, self.case.tokens
        names = ("gate_XND", "up_XND", "down_XND")
        made = {name: self._rows(experts * neurons, width) for name in names}
        made = {name: rows.view(experts, neurons, width) for name, rows in made.items()}
        scores_TX = torch.rand(tokens, experts, generator=self.draw, device=self.device)
        self.chosen_TK = scores_TX.topk(2).indices
        made["weight_TK"] = scores_TX.gather(1, self.chosen_TK)
        return made

    def _scores(self) -> LinearScores:
        one = self.operands
        return LinearScores(one["x_TD"], one["router_ED"], one["router_E"], above=0.5)

    def _logits_TE(self) -> Tensor:
        """What the router says, in fp64: an expert whose logit is above 0 runs."""
        x_TD, router_ED, router_E = (
            self.operands[name].double() for name in ("x_TD", "router_ED", "router_E")
        )
        return linear(x_TD, router_ED, router_E)

    def _experts(self, one: Made) -> ExpertWeights:
        rows = (one["gate_XND"], one["up_XND"], one["down_XND"])
        return ExpertWeights(*rows, self.route.act, self.route.up_act)

    def _rows(self, neurons: int, width: int) -> Tensor:
        """Rows of a length of about one; in few bits whole numbers, which any rounding keeps."""
        dtype = FLOATS[self.case.x_dtype]
        if self.case.dtype not in FEW_BITS:
            return (self._normal(neurons, width) / width**0.5).to(dtype)
        top = 7 if self.case.dtype == "int4" else 127
        codes_FD = torch.randint(
            -top, top + 1, (neurons, width), generator=self.draw, device=self.device
        )
        codes_FD[:, ::GROUP] = top  # so that a scale of every group, or row, is the same
        scale = 2.0 ** round(-torch.tensor(top * width**0.5 / 2).log2().item())
        return (codes_FD * scale).to(dtype)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.draw, device=self.device)

    def _clear_of_kinks(self) -> bool:
        """Whether no number that meets a kink is so near to it that rounding decides."""
        return all(
            float((z.double() - threshold).abs().min()) > MARGIN
            for z, threshold in self._at_kinks()
        )

    def _at_kinks(self) -> Iterator[tuple[Tensor, float]]:
        """Yields what decides or meets a kink of an activation, and where that is."""
        x_TD, one = self.operands["x_TD"].double(), self.operands
        if self.route.mask == "router":
            yield self._logits_TE(), 0.0
        names = ("gate", "up") if "gate_FD" in one or self.case.host else ("up",)
        acts = (self.route.act, self.route.up_act)
        for name, like in zip(names, acts, strict=False):
            act = named(like)
            if isinstance(act, Act) and act.name in GIVES_ZEROS:
                rows_FD = one[f"{name}_XND"].flatten(0, 1) if self.case.host else one[f"{name}_FD"]
                bias_F = one.get(f"{name}_F")
                z_TF = linear(x_TD, rows_FD.double(), None if bias_F is None else bias_F.double())
                yield z_TF, act.threshold
