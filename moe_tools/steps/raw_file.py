"""Numbers on disk, one after the other: they grow batch by batch, and are read as mapped memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def append_raw(file: Path, values: Tensor) -> None:
    """Writes the numbers behind those that are there."""
    with file.open("ab") as out:
        out.write(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())


def map_raw(file: Path, dtype: torch.dtype) -> Tensor:
    """All numbers of a file, in one dimension; what is not read takes no memory."""
    numbers = file.stat().st_size // dtype.itemsize
    return torch.from_file(str(file), shared=False, size=numbers, dtype=dtype)
