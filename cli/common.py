"""What several verbs do once they run. It imports torch, so verbs import it inside `run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from moe_tools import processes
from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.disk import writing
from moe_tools.inference.optimized import PACKED
from moe_tools.report.repeats import print_repeats
from moe_tools.report.report import Row, print_table, to_json

__all__ = [
    "DTYPES",
    "PACKED",
    "pick_dtype",
    "quiet_transformers",
    "show_rows",
    "table_file",
    "use_device",
    "write_text",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def use_device(name: str) -> str:
    """Checks that a device is there, and makes it the current one.

    Triton's kernels and some libraries run on the current GPU, wherever their tensors are. Each of
    several processes takes the GPU of its own number, and touches no other.

    Args:
        name: cpu, cuda, cuda:1, ...; auto is cuda if there is one, else cpu.

    Returns:
        The device's name.

    Raises:
        ValueError: no such device, not on this machine, or one GPU for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = _own(torch.device(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from error
    if device.type == "meta":
        raise ValueError("--device meta holds no numbers: use cpu or cuda")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device.index)
    return str(device)


def _own(device: torch.device) -> torch.device:
    """Gives each of several processes its own GPU."""
    if device.type != "cuda" or processes.count() == 1:
        return device
    if device.index is not None:
        raise ValueError(
            f"--device {device} is one GPU for {processes.count()} processes: use cuda, and each "
            "takes its own"
        )
    return torch.device("cuda", processes.local_rank())


def pick_dtype(name: str, device: str) -> torch.dtype:
    """Translates bf16 and fp32; `auto` is bf16 where the device has instructions for it."""
    if name != "auto":
        return DTYPES[name]
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def table_file(json: str | None) -> TextIO:
    """Returns the file for a table: standard output, unless JSON goes there."""
    return sys.stderr if json == "-" else sys.stdout


def show_rows(rows: Sequence[Row], json: str | None) -> None:
    """Prints rows as a table, and writes them to the target of `--json`, if there is one.

    Rows that differ in their seed alone have a second table, of their means.
    """
    file = table_file(json)
    print_table(rows, file)
    print_repeats(rows, file)
    if json:
        write_text(to_json(rows), json)


def write_text(text: str, target: str) -> None:
    """Writes to a file, or to standard output if the target is `-`."""
    if target == "-":
        sys.stdout.write(text + "\n")
    else:
        with writing(target):
            Path(target).write_text(text + "\n", encoding="utf-8")
