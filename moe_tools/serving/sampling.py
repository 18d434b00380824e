"""How a token is chosen from its logits, by the settings and the seed of its own request.

transformers samples a batch by the settings of its first request, and from one global generator.
Here each request has its own; what a batch makes of it does not depend on its neighbours.

Letters: V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLD = 1e-6
"""A temperature below it is 0: the likeliest token alone, in numbers that fp32 has no room for."""


@dataclass(frozen=True)
class Sampling:
    """How to choose."""

    temperature: float = 0.0
    """0: the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Only so many of the likeliest; 0: all."""
    seed: int | None = None
    """None: another one each time."""

    @classmethod
    def of_model(cls, settings: Any) -> Sampling:
        """What `generation_config.json` says where a request says nothing."""
        if not getattr(settings, "do_sample", False):
            return cls()
        read = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        found = {name: getattr(settings, name, None) for name in read}
        numbers = {k: v for k, v in found.items() if isinstance(v, int | float) and v >= 0}
        return cls(**(read | numbers))  # type: ignore[arg-type]


UNREAD = {"min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""What `generation_config.json` may also say, and `Chooser` does not do -> what says nothing."""


def unread(settings: Any) -> list[str]:
    """What of a `generation_config.json` has no effect on how tokens are chosen here."""
    if not getattr(settings, "do_sample", False):
        return []
    said = {name: getattr(settings, name, None) for name in UNREAD}
    return [name for name, value in said.items() if value not in (None, UNREAD[name])]


class Chooser:
    """Chooses the tokens of one request."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self._drawn = torch.Generator(device)
        if sampling.seed is None:
            self._drawn.seed()
        else:
            self._drawn.manual_seed(sampling.seed)

    def narrow(self, scores_V: Tensor) -> Tensor:
        """Scores of which the chosen token's is the largest: what takes the largest takes it."""
        if self.sampling.temperature < COLD or not bool(scores_V.max().isfinite()):
            return scores_V  # nothing can be drawn of NaN; the largest is taken, as if greedy
        drawn = torch.multinomial(self._probabilities(scores_V), 1, generator=self._drawn)
        return torch.full_like(scores_V, -torch.inf).index_fill_(0, drawn, 0.0)

    def _probabilities(self, scores_V: Tensor) -> Tensor:
        scores_V = scores_V.float()
        # the largest is 0 before the division: a temperature near 0 gives -inf, and no NaN
        scores_V = (scores_V - scores_V.max()) / self.sampling.temperature
        size = scores_V.shape[0]
        count = min(self.sampling.top_k or size, size)
        if count < size:
            least = scores_V.topk(count).values[-1]
            scores_V = scores_V.masked_fill(scores_V < least, -torch.inf)
        kept_V = scores_V.softmax(-1)
        if self.sampling.top_p < 1:
            sorted_V, order = kept_V.sort(descending=True)
            before_V = sorted_V.cumsum(-1) - sorted_V  # the likeliest token always stays
            kept_V = kept_V.index_fill(0, order[before_V >= self.sampling.top_p], 0.0)
        return kept_V
