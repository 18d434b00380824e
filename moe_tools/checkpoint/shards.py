"""Writes the index of a folder whose tensors are in several files."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import safe_open

from moe_tools.names import INDEX


def write_index(folder: Path) -> None:
    """Writes which shard holds which tensor, as transformers does; reads no tensor."""
    weight_map: dict[str, str] = {}
    parameters = size = 0
    for shard in sorted(folder.glob("model-*-of-*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            names = list(file.keys())
            parameters += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        weight_map |= dict.fromkeys(names, shard.name)
        size += _tensor_bytes(shard)
    metadata = {"total_parameters": parameters, "total_size": size}
    block = {"metadata": metadata, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(block, indent=2, sort_keys=True) + "\n")


def _tensor_bytes(shard: Path) -> int:
    """Size of a shard without its header, whose length is in the first eight bytes."""
    with shard.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    return shard.stat().st_size - header
