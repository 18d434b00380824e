"""How the threads of OpenMP, and so PyTorch's, wait for work. No torch.

By default they spin: on cores that other programs also use, a spinning thread takes the time that
the others need. OpenMP reads the variables below once, when torch loads it.
"""

from __future__ import annotations

import os
import sys

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables with which a user chooses: OpenMP's own, GCC's, and Intel's and LLVM's."""


def passive_waiting() -> None:
    """Lets threads sleep while they wait, unless the user has chosen or torch is loaded."""
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOICES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def wait_policy() -> str:
    """What the environment says about waiting, e.g. OMP_WAIT_POLICY=PASSIVE."""
    chosen = [f"{name}={os.environ[name]}" for name in CHOICES if name in os.environ]
    return ", ".join(chosen) or "OpenMP's own"
