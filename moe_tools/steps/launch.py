"""Where and how train steps are computed: nothing in it changes what is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_tools.registry import unknown
from moe_tools.steps.time_limit import TimeLimit

if TYPE_CHECKING:
    import torch

ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""Ways to compute attention, by transformers' names."""


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
    compile: bool = False
    """The forward and backward pass of the model are compiled by torch.compile."""
    attention: str | None = None
    """One of `ATTENTIONS`; None: what transformers takes for the model, sdpa where it can."""
    limit: TimeLimit | None = None
    """When the run stops at a checkpoint."""
    peak_flops: float | None = None
    """Matrix FLOPs a second that one device can do at most; None: as
    `moe_tools.training.throughput` knows it."""

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


def check_launch(launch: Launch, dtype: torch.dtype | None = None) -> None:
    """Checks that what it names is installed and works here.

    Args:
        launch: how train steps are computed.
        dtype: of the host's weights.

    Raises:
        ValueError: DeepSpeed or a reporter is not, or there is no such reporter; attention that is
            not installed, or not for this device and dtype; torch.compile does not work here.
    """
    if launch.deepspeed is not None and find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs DeepSpeed: pip install 'moe-tools[deepspeed]'")
    _check_reporters(launch.report_to)
    if launch.attention is not None:
        _check_attention(launch.attention, launch.device, dtype)
    if launch.compile:
        _check_compile(launch)


def _check_reporters(names: tuple[str, ...]) -> None:
    if not names:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise unknown("reporter", name, INTEGRATION_TO_CALLBACK)
        if name not in get_available_reporting_integrations():
            raise ValueError(f"--report-to {name}: its package is not installed")


def _check_attention(name: str, device: str, dtype: torch.dtype | None) -> None:
    if name not in ATTENTIONS:
        raise unknown("attention", name, ATTENTIONS)
    if not name.startswith("flash"):
        return
    import torch
    from transformers.utils.import_utils import (
        is_flash_attn_2_available,
        is_flash_attn_3_available,
    )

    if torch.device(device).type != "cuda":
        raise ValueError(f"--attention {name} runs on a GPU alone, but the run is on {device}")
    if dtype == torch.float32:
        raise ValueError(f"--attention {name} computes in 16 bits: add --dtype bf16")
    # transformers alone would load code from the hub in place of a package that is not there
    there = is_flash_attn_2_available if name.endswith("2") else is_flash_attn_3_available
    if not there():
        package = "flash-attn" if name.endswith("2") else "flash-attn-3"
        raise ValueError(f"--attention {name} needs the package {package}, which is not installed")


def _check_compile(launch: Launch) -> None:
    """Compiles one addition: whether a compiler is there, and Triton, shows in no other way."""
    if launch.zero_stage == 3:
        raise ValueError(
            "--compile does not go with ZeRO-3, which puts weights in place inside the forward "
            "pass: use zero2, or leave --compile out"
        )
    import torch

    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=launch.device))
    except Exception as error:  # of a compiler, of Triton, of the interpreter
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ValueError(f"--compile: torch.compile does not work here: {reason}") from error
