"""How a mask of neurons meets the truth "the neuron is non-zero".

Letters: T tokens, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from torch import Tensor


@dataclass
class Prediction:
    """Four counts over tokens and neurons, and the shares that follow from them."""

    seen: int = 0
    on: int = 0
    """Predicted non-zero."""
    nonzero: int = 0
    """Truly non-zero."""
    hits: int = 0
    """Predicted non-zero, and truly so."""

    def add(self, mask_TF: Tensor, nonzero_TF: Tensor) -> None:
        """Counts one batch."""
        self.seen += mask_TF.numel()
        self.on += int(mask_TF.sum())
        self.nonzero += int(nonzero_TF.sum())
        self.hits += int((mask_TF & nonzero_TF).sum())

    @property
    def recall(self) -> float:
        """Share of the non-zero neurons that are predicted on; 1 if there are none to miss."""
        return self.hits / self.nonzero if self.nonzero else 1.0

    @property
    def precision(self) -> float:
        """Share of the neurons predicted on that are non-zero; 1 if none is predicted on."""
        return self.hits / self.on if self.on else 1.0

    @property
    def sparsity(self) -> float:
        """Share of the neurons that are predicted off; 0 before the first token."""
        return 1 - self.on / self.seen if self.seen else 0.0

    def figures(self) -> dict[str, float]:
        """Recall, precision and predicted sparsity, and the counts that they are of."""
        shares = {"recall": self.recall, "precision": self.precision, "sparsity": self.sparsity}
        return {**shares, **asdict(self)}


def merge_predictions(predictions: Iterable[Prediction]) -> Prediction:
    """The counts of several FFNs as one: each weighed by the tokens it saw."""
    total = Prediction()
    for one in predictions:
        total.seen += one.seen
        total.on += one.on
        total.nonzero += one.nonzero
        total.hits += one.hits
    return total
