"""Which calls correctness is asked of: of one FFN, and of the experts of a host.

Letters: D model width, F neurons, E experts, X experts of a host, N neurons of one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from moe_tools.kernels.activations import Act, ActName
from moe_tools.kernels.quantize import INT4
from moe_tools.kernels.triton.config import MOST_TOGETHER

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FEW_BITS = {"int8": torch.int8, "int4": INT4}
"""What weights are stored as, without gradients."""
TOKENS = (1, 16, 70, 3, 33, 64)
"""Every tile of tokens, full and not; the first three come first."""
HOST_TOKENS = (1, 5, MOST_TOGETHER + 7)
"""Under a mask, and grouped by expert."""
ODD, REAL, TINY = (203, 13, 411), ((4096, 344, 11008), (576, 48, 1536)), (37, 7, 52)
"""(D, E, F): rows at odd addresses and several tiles of each kind; of LLaMA-2-7B and SmolLM2, with
experts of 32; and for the interpreter."""
HOST_ODD, HOST_REAL, HOST_TINY = (203, 5, 75), (2048, 8, 1408), (19, 4, 11)
"""(D, X, N)."""


@dataclass(frozen=True)
class Route:
    """How it is decided which neurons run."""

    act: ActName | Act
    up_act: ActName = "identity"
    mask: str | None = None
    """Of experts, soft; of neurons, hard; None: the gate decides."""
    atomic: bool = False
    scores: str | None = None
    """What selects in the first launch, and has no gradients: a router, or copies in few bits."""
    off: bool = False
    """What is off adds a constant, and the residual is added to y."""


ROUTES = {
    "experts": Route("silu", mask="experts"),
    "exact gate, relu": Route("relu"),
    "neurons": Route("silu", mask="neurons"),
    "exact gate, dReLU": Route("relu", "relu"),
    "exact gate, fatrelu": Route(Act("fatrelu", 0.5)),
    "predicted, relu": Route("relu", mask="neurons"),
    "routed": Route("silu", scores="router", off=True),
    "proposed": Route("silu", scores="copies", off=True),
    "experts, atomic": Route("silu", mask="experts", atomic=True),
}


@dataclass(frozen=True)
class Case:
    """One call of one kernel path."""

    route: str
    """Of `ROUTES`."""
    gated: bool
    dtype: str
    """Of the weights."""
    tokens: int
    shape: tuple[int, int, int]
    """(D, E, F), of a host (D, X, N)."""
    host: bool = False
    gradients: bool = True

    @property
    def name(self) -> str:
        """What an error calls it."""
        kind = "host" if self.host else "gated" if self.gated else "plain"
        size = "x".join(map(str, self.shape))
        tokens = f"{self.tokens} token{'s' if self.tokens > 1 else ''}"
        return f"{self.route}; {kind}, {self.dtype}, {tokens}, {size}"

    @property
    def x_dtype(self) -> str:
        """The dtype of x: that of the weights; bf16 where these have few bits, fp32 on a CPU."""
        if self.dtype not in FEW_BITS:
            return self.dtype
        return "fp32" if self.shape == TINY else "bf16"

    @property
    def rare(self) -> bool:
        """Whether another number of tokens fills the same tile."""
        return self.shape == ODD and self.tokens not in TOKENS[:3]

    @property
    def learns(self) -> bool:
        """Whether gradients are compared, too."""
        packed = self.dtype in FEW_BITS or ROUTES[self.route].scores is not None
        return self.gradients and not packed


def cases(dry: bool, lacks: list[str]) -> list[Case]:
    """Lists the cases, those first that would miss most; dry ones are few and tiny."""
    if dry:
        return [*_dry_cases()]
    found = [*_ffn_cases(), *_host_cases(), *_real_cases()]
    found = [case for case in found if not {case.dtype, case.x_dtype} & set(lacks)]
    return sorted(found, key=lambda case: (case.rare, case.dtype not in ("bf16", *FEW_BITS)))


def _ffn_cases() -> Iterator[Case]:
    for tokens, (name, route), gated in product(TOKENS, ROUTES.items(), (True, False)):
        if gated or route.up_act == "identity":
            for dtype in (*FLOATS, *FEW_BITS):
                yield Case(name, gated, dtype, tokens, ODD)


def _host_cases() -> Iterator[Case]:
    for tokens, name, dtype in product(HOST_TOKENS, ROUTES, FLOATS):
        gate_decides = ROUTES[name].mask is None and ROUTES[name].scores is None
        if gate_decides or name == "experts":
            yield Case(name, True, dtype, tokens, HOST_ODD, host=True)
    for tokens in (1, 16, 512):
        yield Case("experts", True, "bf16", tokens, HOST_REAL, host=True, gradients=False)


def _real_cases() -> Iterator[Case]:
    for shape, tokens in product(REAL, (1, 16, 64)):
        yield Case("experts", True, "bf16", tokens, shape, gradients=tokens == 16)
        for stored in FEW_BITS:
            yield Case("experts", True, stored, tokens, shape)
        yield Case("neurons", True, "bf16", tokens, shape, gradients=False)
        # y of relu has no jump, its gradients have: with so many numbers some meet the kink.
        yield Case("exact gate, relu", True, "bf16", tokens, shape, gradients=False)
    for shape, name in product(REAL, ("routed", "proposed")):
        # With more tokens some number would meet the threshold.
        yield Case(name, True, "bf16", 1, shape)


def _dry_cases() -> Iterator[Case]:
    for (name, route), gated in product(ROUTES.items(), (True, False)):
        if gated or route.up_act == "identity":
            yield Case(name, gated, "fp32", 3, TINY)
    for tokens in (1, MOST_TOGETHER + 6):
        yield Case("experts", True, "fp32", tokens, TINY)
        yield Case("exact gate, relu", True, "fp16", min(tokens, 3), TINY)
        for stored in FEW_BITS:
            yield Case("experts", True, stored, min(tokens, 3), TINY)
        yield Case("experts", True, "fp32", tokens, HOST_TINY, host=True)
