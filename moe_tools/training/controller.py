"""How a train step reaches its target sparsity: a smooth reference, and what follows it. No torch.

Every drive follows the same reference. `shift` moves the line: after every optimizer step all FFNs
get one common shift (`moe_tools.experts.line`), so that sparsity is where the reference is however
few the steps are. The others turn the weight of a loss, which the papers leave to the user: `eta`
that of the efficiency loss (LTE, arXiv 2402.06126, eta in (0, 2]), `l1` and `hoyer` lambda of the
penalty on the activations of a dense model (ProSparse, arXiv 2402.13516; D2DMoE, arXiv 2310.04361),
whose sparsity is the share of exact zeros. Through Adam a large weight moves a model no faster than
its learning rate lets it, so these need hundreds of steps; and they only push: a model that is
sparser than its target comes back as far as the language loss pulls it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

logger = logging.getLogger(__name__)

MISSED = 0.05
"""Distance from the target that is worth a warning."""
LOOKS = 3
"""Logged figures that say together where a step has ended."""


GOLDEN = (math.sqrt(5) - 1) / 2
MOST = 0.99
"""The largest sparsity that a step draws."""

Drive = Literal["shift", "eta", "l1", "hoyer"]
"""What brings the sparsity to its target."""


class Driven(NamedTuple):
    """Names the loss that a drive weighs, and its weights."""

    loss: str
    start: float
    """Its weight at first, if the recipe gives none: too low costs steps, too high overshoots."""
    bounds: tuple[float, float]


ZEROS = ("l1", "hoyer")
"""Drives of dense models, to a share of exact zeros."""
DRIVEN = {"eta": Driven("efficiency", 0.1, (1e-3, 10.0))}
DRIVEN |= {name: Driven(name, 1e-6, (1e-9, 1.0)) for name in ZEROS}


@dataclass(frozen=True)
class Reference:
    """The sparsity asked for at each step: a half cosine from the start to the target."""

    start: float
    target: float
    steps: int
    """Optimizer steps of the train step."""
    ramp: float
    """Share of the steps in which the target is reached; then the reference stays."""
    vary: float = 0.0
    """Every step draws its own sparsity, at most so far from the reference."""

    def after(self, step: int) -> float:
        """Returns the sparsity of the step that follows, in (0, 1).

        Drawn without chance: multiples of the golden ratio fill an interval evenly, however many
        there are of them, and a run that resumes draws the same. The last step draws nothing, so
        that its figures are those of the target.
        """
        if step >= self.steps - 1:
            return self.at(step)
        drawn = self.at(step) + self.vary * (2 * ((step * GOLDEN) % 1) - 1)
        return min(MOST, max(1 - MOST, drawn))

    def at(self, step: int) -> float:
        """Returns the sparsity asked for after an optimizer step, in (0, 1)."""
        progress = 1.0 if self.ramp <= 0 else min(1.0, step / (self.ramp * self.steps))
        return self.start + (self.target - self.start) * (0.5 - 0.5 * math.cos(math.pi * progress))


@dataclass
class WeightController:
    """A PI controller in velocity form on the log of a weight: no scale of the plant is assumed."""

    weight: float
    bounds: tuple[float, float]
    error: float = 0.0
    proportional: float = 30.0
    """Change of the log for a change of the error by 1."""
    integral: float = 1.2
    """Change of the log in one step for an error of 1."""

    def update(self, reference: float, sparsity: float) -> float:
        """Takes one step's sparsity and returns the weight for the next."""
        error = reference - sparsity
        change = self.proportional * (error - self.error) + self.integral * error
        low, high = self.bounds
        self.error = error
        self.weight = min(high, max(low, self.weight * math.exp(max(-0.5, min(0.5, change)))))
        return self.weight


def followed(figures: dict[str, float], drive: str) -> float:
    """Returns the sparsity, among the figures of a step, that a drive leads to its target."""
    return figures["zeros" if drive in ZEROS else "sparsity"]


def warn_if_missed(looks: Sequence[dict[str, float]], target: float, drive: str) -> None:
    """Logs a warning when a train step ends far from its target.

    Args:
        looks: the last figures of the step: one batch alone may be five points off by chance.
        target: where the reference ends.
        drive: what should have brought the sparsity there.
    """
    missed = [followed(figures, drive) - figures["reference"] for figures in looks]
    sparsity = target + sum(missed) / len(missed)
    if abs(sparsity - target) > MISSED:
        remedy = "more steps" if drive == "shift" else "more steps or a higher learning rate"
        ends = f"{sparsity:.1%} at the end, {target:.1%} asked for"
        logger.warning("sparsity: %s; drive %s needs %s", ends, drive, remedy)
