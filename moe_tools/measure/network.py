"""Predicts what a process sends to others for one optimizer step under ZeRO, in rings.

ZeRO (arXiv 1910.02054, section 7), for p bytes of gradients: an all-reduce is a reduce-scatter and
an all-gather, p (N - 1) / N each on a ring of N processes. Stages 0, 1 and 2 so send 2 p, stage 3
sends 3 p: weights are gathered for the forward pass, again for the backward pass, and gradients
scattered. With several passes an optimizer step, stages 2 and 3 do that for every pass; stages 0
and 1 once, 0 in fp32 (PyTorch alone, `moe_tools.training.optimizer`).
"""

from __future__ import annotations

from moe_tools.measure.memory import ModelStates, Teacher, check_stage


def sent_bytes(
    states: ModelStates,
    stage: int,
    processes: int,
    *,
    passes: int = 1,
    teacher: Teacher = "whole",
) -> float:
    """Bytes that one process sends for an optimizer step of so many passes; it receives as many.

    Raises:
        ValueError: no such stage, or fewer than one process.
    """
    check_stage(stage, processes)
    reduced, updated = states.gradients, states.gradients
    if stage == 0:
        sent: float = 2 * (states.sums or reduced)
    elif stage == 1:
        sent = reduced + updated
    elif stage == 2:
        sent = passes * reduced + updated
    else:
        sent = passes * (2 * states.weights + reduced)
    if teacher == "sharded":
        sent += passes * states.teacher
    return sent * (processes - 1) / processes
