"""Selectors decide: scores in, mask out. Letters: T tokens, E experts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_tools.registry import Registry


class Selector(Protocol):
    """Turns scores_TE into a boolean mask_TE: which experts run for each token."""

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """mask_TE."""
        ...


@dataclass(frozen=True)
class Threshold:
    """Every expert with a score above tau runs (LTE, arXiv 2402.06126: tau = 0.5 in all layers)."""

    tau: float = 0.5

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """mask_TE."""
        return scores_TE > self.tau


@dataclass(frozen=True)
class TopK:
    """The k experts of the highest score run, for every token."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"top-k needs k >= 1, not {self.k}")

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """mask_TE.

        Raises:
            ValueError: k exceeds the number of experts.
        """
        if self.k > scores_TE.shape[-1]:
            raise ValueError(f"top-k asks for {self.k} of {scores_TE.shape[-1]} experts")
        chosen_TK = scores_TE.topk(self.k, dim=-1).indices
        return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(-1, chosen_TK, True)


SELECTORS: Registry[type[Threshold] | type[TopK]] = Registry(
    "selector", {"threshold": Threshold, "topk": TopK}
)


def build_selector(spec: dict[str, Any]) -> Selector:
    """A selector from its config entry, e.g. {"kind": "threshold", "tau": 0.5}.

    Raises:
        ValueError: no or an unknown kind, or arguments that this kind does not take.
    """
    arguments = {key: value for key, value in spec.items() if key != "kind"}
    kind = SELECTORS[spec.get("kind", "")]
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"selector {spec}: {error}") from error


def describe_selector(selector: Threshold | TopK) -> dict[str, Any]:
    """The config entry of a selector: the inverse of `build_selector`."""
    kind = next(name for name, kind in SELECTORS.items() if kind is type(selector))
    return {"kind": kind, **asdict(selector)}
