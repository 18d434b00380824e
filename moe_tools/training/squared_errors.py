"""What a regression learns from: the squared error, of its scores and of its teacher's.

Letters: B texts.
"""

from __future__ import annotations

from torch import Tensor


def squared_errors(
    scores_B1: Tensor, labels_B: Tensor, donor_B1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns two means over the texts, differentiable, in fp32.

    The first is of (score - label)^2, the second of (score - donor's score)^2: over one output, the
    KL divergence of the classes would be 0 whatever the two say. It is zero without a donor.
    """
    scores_B = scores_B1.float().squeeze(-1)
    error = (scores_B - labels_B.float()).square().mean()
    if donor_B1 is None:
        return error, error.new_zeros(())
    return error, (scores_B - donor_B1.float().squeeze(-1)).square().mean()
