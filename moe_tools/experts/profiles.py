"""What each neuron does on calibration text, in a memory that does not grow with the tokens.

Letters: T tokens, F neurons, X dimensions of a sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor

SKETCH = 256
"""X: dimensions that are left of the tokens."""
MARKED = 10
"""Neurons that a token marks (K_a of CMoE, arXiv 2502.04416)."""


class Sketch:
    """One row a neuron: what it did on all tokens, projected at random to few dimensions.

    A Gaussian projection keeps distances (Johnson and Lindenstrauss, 1984), so k-means sees the
    same clusters, and 192 experts take a tenth of the time.
    """

    def __init__(self, neurons: int, device: torch.device, seed: int) -> None:
        self.rows_FX = torch.zeros(neurons, SKETCH, device=device)
        self.random = torch.Generator().manual_seed(seed)
        self.tokens = 0

    def add(self, values_TF: Tensor) -> None:
        """Adds a batch of tokens."""
        project_TX = torch.randn(len(values_TF), SKETCH, generator=self.random)
        self.rows_FX += values_TF.float().T @ project_TX.to(values_TF.device)
        self.tokens += len(values_TF)

    def rows(self) -> Tensor:
        """(F, X) in fp32; distances are root mean squares over the tokens."""
        return self.rows_FX / (self.tokens * SKETCH) ** 0.5


def contributions_TF(h_TF: Tensor, down_norm_F: Tensor) -> Tensor:
    """|h| ||w_down||: how far each neuron moves the output."""
    return h_TF.float().abs() * down_norm_F


def marks_TF(h_TF: Tensor) -> Tensor:
    """1 for the `MARKED` neurons of the largest |h| of each token, else 0 (CMoE)."""
    top_TK = h_TF.abs().topk(min(MARKED, h_TF.shape[-1]), dim=-1).indices
    return torch.zeros_like(h_TF, dtype=torch.float32).scatter(-1, top_TK, 1.0)
