"""A step that calibrates, done on a model or on a part of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.experts.conversion import conversion_so_far, write_conversion
from moe_tools.recipe import Attach, Budget, Fit, Split, Swap
from moe_tools.runs.rehearsal import with_split
from moe_tools.steps.attach import attach, attach_needs_text
from moe_tools.steps.budget import budget
from moe_tools.steps.fit import fit
from moe_tools.steps.split import split, split_needs_text
from moe_tools.steps.swap import swap, swap_needs_text

Calibrating = Swap | Split | Attach | Fit | Budget


def needs_text(step: Calibrating) -> bool:
    """Whether a step looks at activations; else weights are all that it needs."""
    if isinstance(step, Swap):
        return swap_needs_text(step)
    if isinstance(step, Split):
        return split_needs_text(step)
    return not isinstance(step, Attach) or attach_needs_text(step)


def apply_step(
    model: PreTrainedModel,
    step: Calibrating,
    blocks_BT: Tensor,
    work: Path,
    *,
    donor: str,
    seed: int,
) -> dict[str, Any]:
    """Does a step, in place.

    Args:
        model: a whole one, or a part with a layer in it.
        step: any that takes no gradient steps through the model.
        blocks_BT: calibration text.
        work: a folder for what it cannot keep in memory.
        donor: where all started from.
        seed: of what is random.

    Returns:
        What it measured.

    Raises:
        ValueError: as the step says.
    """
    so_far = conversion_so_far(model, donor)
    if isinstance(step, Swap):
        return swap(model, step, so_far, blocks_BT)
    if isinstance(step, Split):
        split(model, step, blocks_BT, seed)
        write_conversion(model, with_split(so_far, step))
        return {}
    if isinstance(step, Attach):
        attach(model, step, so_far, blocks_BT)
        return {}
    if isinstance(step, Fit):
        return fit(model, step, blocks_BT, work, seed=seed)
    return budget(model, step, blocks_BT)
