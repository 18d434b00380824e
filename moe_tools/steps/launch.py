"""Where and how train steps are computed: nothing in it changes what is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_tools.registry import unknown


@dataclass(frozen=True)
class Launch:
    """Says how every train step of a run is computed."""

    device: str = "cpu"
    deepspeed: Mapping[str, Any] | None = None
    """DeepSpeed's configuration (`moe_tools.recipe.deepspeed`); None: PyTorch alone, in several
    processes its DistributedDataParallel."""
    report_to: tuple[str, ...] = ()
    """Reporters that transformers knows, e.g. tensorboard."""
    logs: Path | None = None
    """Folder of what TensorBoard shows."""

    @property
    def zero_stage(self) -> int | None:
        """What DeepSpeed shards: 0 nothing, 1 optimizer, 2 gradients too, 3 weights too."""
        if self.deepspeed is None:
            return None
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def home(self) -> str:
        """Where a model is loaded: DeepSpeed takes it to the devices itself, in shards."""
        return self.device if self.deepspeed is None else "cpu"


def check_launch(launch: Launch) -> None:
    """Checks that what it names is installed.

    Raises:
        ValueError: DeepSpeed or a reporter is not, or there is no such reporter.
    """
    if launch.deepspeed is not None and find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs DeepSpeed: pip install 'moe-tools[deepspeed]'")
    if not launch.report_to:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in launch.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown("reporter", name, INTEGRATION_TO_CALLBACK)
        if name not in get_available_reporting_integrations():
            raise ValueError(f"--report-to {name}: its package is not installed")
