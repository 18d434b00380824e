"""How the threads of OpenMP, and so PyTorch's, wait for work. No torch.

By default they spin for milliseconds: on cores that other programs also use, a spinning thread
takes the time that the others need. Threads that sleep at once cost a model of small matrices a
quarter of its speed on an idle machine, since they wake up for every operation. A short spin, as
long as the gap between two operations, has the best of both (LOG.md, 2026-11-28).

OpenMP reads the variables below once, when torch loads it.
"""

from __future__ import annotations

import os
import sys

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables with which a user chooses: OpenMP's own, GCC's, and Intel's and LLVM's."""


PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
"""Ours: threads sleep, GCC's OpenMP (torch's on Linux) after 10,000 rounds; by default, 300,000."""


def passive_waiting() -> None:
    """Lets threads sleep while they wait, unless the user has chosen or torch is loaded."""
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOICES):
        os.environ.update(PASSIVE)


def wait_policy() -> str:
    """What the environment says about waiting, e.g. OMP_WAIT_POLICY=PASSIVE."""
    chosen = [f"{name}={os.environ[name]}" for name in CHOICES if name in os.environ]
    return ", ".join(chosen) or "OpenMP's own"
