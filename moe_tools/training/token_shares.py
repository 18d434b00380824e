"""Makes every learned token of an optimizer step count alike, however many its pass has.

The loss of a pass is a mean over its learned tokens, and passes of conversations have few or many:
the mean of these means would favour the tokens of short answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_tools import processes
from moe_tools.data import Batch
from moe_tools.names import IGNORE


def token_shares(batches: Sequence[Batch], device: torch.device) -> list[Tensor]:
    """Learned tokens of each pass, over the mean of all passes of all processes.

    Every process comes here with as many passes, whether or not its own have as many tokens.

    Args:
        batches: of the passes of one optimizer step in this process.
        device: where the processes meet.

    Returns:
        A scalar a pass, fp32; their mean over all passes is 1.
    """
    labels = [batch.next_labels_BT() for batch in batches]
    counts = torch.stack([(one != IGNORE).sum().float() for one in labels]).to(device)
    mean = counts.mean()
    processes.average_([mean])
    return [*(counts / mean)]
