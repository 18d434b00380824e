"""How a train step reaches its target sparsity: a smooth reference, and what follows it. No torch.

Two drives follow the same reference. `shift` moves the line: after every optimizer step all
routers get one common constant (`trim.py`), so that sparsity is where the reference is however
few the steps are. `eta` is LTE's own knob, the weight of the efficiency loss, which the paper
leaves to the user (arXiv 2402.06126, eta in (0, 2]): here a controller turns it. Through Adam a
large eta moves a logit no faster than the router's learning rate lets it, so `eta` needs hundreds
of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reference:
    """The sparsity asked for at each step: a half cosine from the start to the target."""

    start: float
    target: float
    steps: int
    """Optimizer steps of the train step."""
    ramp: float
    """Share of the steps in which the target is reached; then the reference stays."""

    def at(self, step: int) -> float:
        """Sparsity in (0, 1)."""
        progress = 1.0 if self.ramp <= 0 else min(1.0, step / (self.ramp * self.steps))
        return self.start + (self.target - self.start) * (0.5 - 0.5 * math.cos(math.pi * progress))


@dataclass
class EtaController:
    """A PI controller in velocity form on log eta: it needs no knowledge of the plant's scale."""

    eta: float = 0.1
    error: float = 0.0
    proportional: float = 30.0
    """Change of log eta for a change of the error by 1."""
    integral: float = 1.2
    """Change of log eta in one step for an error of 1."""
    bounds: tuple[float, float] = field(default=(1e-3, 10.0))

    def update(self, reference: float, sparsity: float) -> float:
        """Takes one step's sparsity and returns eta for the next."""
        error = reference - sparsity
        change = self.proportional * (error - self.error) + self.integral * error
        low, high = self.bounds
        self.error = error
        self.eta = min(high, max(low, self.eta * math.exp(max(-0.5, min(0.5, change)))))
        return self.eta
