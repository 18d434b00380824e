"""The folder that is exported: its config first, then its tensors, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from moe_tools.checkpoint.broken import named_errors
from moe_tools.checkpoint.loading import read_config
from moe_tools.checkpoint.stored import stored_tensors
from moe_tools.experts.conversion import Conversion, read_block

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
WANTED += ["LICENSE*", "NOTICE*"]
"""What is fetched of a hub id."""


@dataclass(frozen=True)
class Source:
    """A model folder, of which only the config was read."""

    name: str
    """Folder or hub id, as the user gave it."""
    config: Any
    conversion: Conversion | None
    """None: moe-tools never touched it."""

    @classmethod
    def read(cls, name: str) -> Source:
        """Reads the config of a folder or hub id.

        Raises:
            ValueError: nothing there, a GGUF file, or a block that this version cannot read.
        """
        if Path(name).suffix == ".gguf":
            raise ValueError(
                f"{name} is a GGUF file, and export takes a folder: write one by "
                "`moe_tools.save(moe_tools.load(FILE), FOLDER)`"
            )
        place = "" if Path(name).is_dir() else "no such folder, and as a hub id: "
        with named_errors(f"cannot load {name}: {place}"):
            config = read_config(name)
        return cls(name, config, read_block(config))

    @cached_property
    def folder(self) -> Path:
        """Where its files are; those of a hub id are fetched, once.

        Raises:
            ValueError: they cannot be fetched.
        """
        if Path(self.name).is_dir():
            return Path(self.name)
        with named_errors(f"cannot fetch {self.name}: "):
            return Path(snapshot_download(self.name, allow_patterns=WANTED))

    def tensors(self) -> StoredTensors:
        """Its tensors, by the host's names and ours.

        Raises:
            ValueError: a weight file is missing or truncated.
        """
        return StoredTensors(stored_tensors(self.folder))


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in files, each read when it is asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def nbytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        """Bytes of a tensor, without reading it; as floats of `dtype` if that is given."""
        with safe_open(self.files[name], framework="pt") as file:
            part = file.get_slice(name)
            numbers = torch.Size(part.get_shape()).numel()
            stored = DTYPES[part.get_dtype()]
        kind = dtype if dtype is not None and stored.is_floating_point else stored
        return numbers * kind.itemsize

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls a dtype -> PyTorch's."""
