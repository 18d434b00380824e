"""Selectors decide: scores in, mask out.

Every kind runs an expert once its knob passes a limit that depends on the token's scores alone, so
one quantile of these limits brings any kind to any density (`tune_selector`).

Letters: T tokens (any leading dimensions), R experts that are routed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from moe_tools.experts.sampling import sample_rows
from moe_tools.registry import Registry

SAMPLE = 2**23
"""Scores that are enough to tune a selector on: 64 MB in double precision."""


class Selector(ABC):
    """Turns scores_TR into a boolean mask_TR: which experts run for each token.

    Every kind has one number that sets how many experts run, its *knob* (tau, k's share, p). An
    expert's *limit* is how far the knob must be opened before that expert runs; it depends on the
    token's scores and not on the knob.
    """

    knob: ClassVar[str]
    """The field that sets how many experts run."""
    needs_ratio_scale: ClassVar[bool] = False
    """Compares shares of scores: negative scores have none."""

    @abstractmethod
    def __call__(self, scores_TR: Tensor) -> Tensor:
        """mask_TR."""

    @abstractmethod
    def limits_TR(self, scores_TR: Tensor) -> Tensor:
        """The limit of every expert: `at(limit)` runs exactly the experts of lower limits."""

    def threshold_T1(self, scores_TR: Tensor) -> Tensor:
        """The score that decides, for each token: here the lowest score that runs.

        No expert below it runs, and every expert above it does.
        """
        return torch.where(self(scores_TR), scores_TR, math.inf).amin(-1, keepdim=True)

    @abstractmethod
    def at(self, limit: float) -> Self:
        """A selector of this kind that runs the experts whose limits are below `limit`."""

    def with_knob(self, value: float) -> Self:
        """A selector of this kind whose knob has the given value.

        Raises:
            ValueError: a value that the kind does not take.
        """
        return replace(self, **{self.knob: value})  # type: ignore[type-var]


@dataclass(frozen=True)
class Threshold(Selector):
    """Every expert with a score above tau runs (LTE, arXiv 2402.06126: tau = 0.5 in all layers)."""

    tau: float = 0.5
    knob = "tau"

    def __post_init__(self) -> None:
        _check_number("threshold", "tau", self.tau)

    def __call__(self, scores_TR: Tensor) -> Tensor:
        return scores_TR > self.tau

    def limits_TR(self, scores_TR: Tensor) -> Tensor:
        """The scores, falling."""
        return -scores_TR

    def threshold_T1(self, scores_TR: Tensor) -> Tensor:
        """Tau, for every token."""
        return torch.full_like(scores_TR[..., :1], self.tau)

    def at(self, limit: float) -> Self:
        return self.with_knob(-limit)


@dataclass(frozen=True)
class TopK(Selector):
    """The k experts of the highest score run, for every token; ties go to the lower expert.

    That holds on every device: torch.topk takes any of several equal scores, a stable sort the
    first. NaN counts as the highest score.
    """

    k: int | None = None
    share: float | None = None
    """k as a share of the experts that are routed, rounded up, in place of k."""
    knob = "share"

    def __post_init__(self) -> None:
        if (self.k is None) == (self.share is None):
            raise ValueError("top-k needs either k or share")
        if self.k is not None and (type(self.k) is not int or self.k < 1):
            raise ValueError(f"top-k needs k >= 1, not {self.k!r}")
        if self.share is not None:
            _check_number("top-k", "a share", self.share)
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"top-k needs a share in (0, 1], not {self.share}")

    def __call__(self, scores_TR: Tensor) -> Tensor:
        """mask_TR.

        Raises:
            ValueError: k exceeds the number of experts.
        """
        k = self.count(scores_TR.shape[-1])
        chosen_TK = scores_TR.argsort(dim=-1, descending=True, stable=True)[..., :k]
        return torch.zeros_like(scores_TR, dtype=torch.bool).scatter(-1, chosen_TK, True)

    def count(self, experts: int) -> int:
        """How many of the experts run.

        Raises:
            ValueError: more than there are.
        """
        k = self.k if self.share is None else max(1, math.ceil(round(self.share * experts, 6)))
        assert k is not None
        if k > experts:
            raise ValueError(f"top-k asks for {k} of {experts} experts")
        return k

    def limits_TR(self, scores_TR: Tensor) -> Tensor:
        """The share of experts that are ranked before."""
        ranking = scores_TR.argsort(dim=-1, descending=True, stable=True)
        return ranking.argsort(-1) / scores_TR.shape[-1]

    def at(self, limit: float) -> Self:
        return replace(self, k=None, share=min(1.0, max(limit, 1e-9)))

    def with_knob(self, value: float) -> Self:
        """A share, in place of k."""
        return replace(self, k=None, share=value)


@dataclass(frozen=True)
class DynamicK(Selector):
    """Every expert with a score of at least (1 - tau) max runs (D2DMoE, arXiv 2310.04361)."""

    tau: float
    knob = "tau"
    needs_ratio_scale = True

    def __post_init__(self) -> None:
        _check_number("dynamic-k", "tau", self.tau)
        if not 0 <= self.tau <= 1:
            raise ValueError(f"dynamic-k needs tau in [0, 1], not {self.tau}")

    def __call__(self, scores_TR: Tensor) -> Tensor:
        """mask_TR; the best expert always runs."""
        return self.limits_TR(scores_TR) <= self.tau

    def limits_TR(self, scores_TR: Tensor) -> Tensor:
        """1 - score / max; 0 where all scores are 0."""
        largest_T1 = scores_TR.amax(-1, keepdim=True)
        return torch.where(largest_T1 > 0, 1 - scores_TR / largest_T1, 0.0)

    def threshold_T1(self, scores_TR: Tensor) -> Tensor:
        """(1 - tau) max."""
        return (1 - self.tau) * scores_TR.amax(-1, keepdim=True)

    def at(self, limit: float) -> Self:
        return self.with_knob(min(1.0, max(0.0, limit)))


@dataclass(frozen=True)
class TopP(Selector):
    """The fewest experts whose scores add up to the share p of all scores run."""

    p: float
    knob = "p"
    needs_ratio_scale = True

    def __post_init__(self) -> None:
        _check_number("top-p", "p", self.p)
        if not 0 < self.p <= 1:
            raise ValueError(f"top-p needs p in (0, 1], not {self.p}")

    def __call__(self, scores_TR: Tensor) -> Tensor:
        """mask_TR; the best expert always runs."""
        return self.limits_TR(scores_TR) < self.p

    def limits_TR(self, scores_TR: Tensor) -> Tensor:
        """The share of the scores that are ranked before."""
        ranked = scores_TR.sort(dim=-1, descending=True, stable=True)
        total_T1 = ranked.values.sum(-1, keepdim=True)
        before = ranked.values.cumsum(-1) - ranked.values
        shares = before / total_T1.clamp_min(torch.finfo(scores_TR.dtype).tiny)
        shares[..., 0] = 0.0
        return torch.empty_like(shares).scatter(-1, ranked.indices, shares)

    def at(self, limit: float) -> Self:
        return self.with_knob(min(1.0, max(limit, 1e-9)))


@dataclass(frozen=True)
class Everything(Selector):
    """Every expert runs: the dense model."""

    knob = ""

    def __call__(self, scores_TR: Tensor) -> Tensor:
        """mask_TR."""
        return torch.ones_like(scores_TR, dtype=torch.bool)

    def limits_TR(self, scores_TR: Tensor) -> Tensor:
        return torch.full_like(scores_TR, -math.inf)

    def at(self, limit: float) -> Self:
        return self


def _check_number(kind: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{kind} needs {name} that is a number, not {value!r}")


def enough_rows(columns: int) -> int:
    """Tokens of so many experts that are enough to tune a selector on."""
    return max(1, SAMPLE // columns)


def tune_selector(selector: Selector, scores_TR: Tensor, density: float) -> Selector:
    """The knob at which the share of the experts that run on these scores is nearest to `density`.

    Experts of one limit run together. Of more than `SAMPLE` scores, some tokens are looked at.

    Raises:
        ValueError: a density outside [0, 1].
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density}, but must be in [0, 1]")
    experts = scores_TR.shape[-1]
    flat_TR = sample_rows(scores_TR.reshape(-1, experts), enough_rows(experts))
    limits_S = selector.limits_TR(flat_TR).double().flatten().cpu().numpy()
    wanted = density * len(limits_S)
    place = max(1, round(wanted)) - 1
    last = np.partition(limits_S, place)[place]  # a quarter of kthvalue's time
    is_below_S, is_above_S = limits_S < last, limits_S > last
    fewer, more = is_below_S.sum(), len(limits_S) - is_above_S.sum()
    if wanted - fewer < more - wanted:
        below = limits_S.max(where=is_below_S, initial=-math.inf) if fewer else last - 1
        return selector.at(float(below + last) / 2)
    above = limits_S.min(where=is_above_S, initial=math.inf) if more < len(limits_S) else last + 1
    return selector.at(float(last + above) / 2)


SELECTORS: Registry[type[Selector]] = Registry(
    "selector", {"threshold": Threshold, "topk": TopK, "dynamic_k": DynamicK, "top_p": TopP}
)


def build_selector(spec: dict[str, Any]) -> Selector:
    """A selector from its config entry, e.g. {"kind": "threshold", "tau": 0.5}.

    Raises:
        ValueError: no or an unknown kind, or arguments that this kind does not take.
    """
    built: Selector = SELECTORS.build(spec)
    return built


def describe_selector(selector: Selector) -> dict[str, Any]:
    """The config entry of a selector: the inverse of `build_selector`.

    Raises:
        ValueError: its class is not in `SELECTORS`.
    """
    kinds = [name for name, kind in SELECTORS.items() if kind is type(selector)]
    if not kinds:
        raise ValueError(
            f"a config cannot hold the selector {type(selector).__name__}: register its class in "
            f"SELECTORS, or use one of {', '.join(SELECTORS)}"
        )
    (kind,) = kinds
    given = {key: value for key, value in asdict(selector).items() if value is not None}  # type: ignore[call-overload]
    return {"kind": kind, **given}
