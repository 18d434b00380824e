"""What several verbs do once they run. Imports torch, so verbs import this inside `run`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.inference.optimized import PACKED

__all__ = ["DTYPES", "PACKED", "pick_device", "pick_dtype", "quiet_transformers", "write_text"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str) -> str:
    """A device that is there; `auto` is cuda if there is one, else the cpu.

    Raises:
        ValueError: no such device, or not on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from error
    if device.type == "meta":
        raise ValueError("--device meta holds no numbers: use cpu or cuda")
    return name


def pick_dtype(name: str, device: str) -> torch.dtype:
    """bf16 or fp32; `auto` is bf16 where the device has instructions for it."""
    if name != "auto":
        return DTYPES[name]
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def write_text(text: str, target: str) -> None:
    """To a file, or to standard output if the target is `-`."""
    if target == "-":
        sys.stdout.write(text + "\n")
    else:
        Path(target).write_text(text + "\n", encoding="utf-8")
