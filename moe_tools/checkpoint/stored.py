"""Finds the weight files of a model folder, and which tensor is in which."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moe_tools.names import INDEX, SINGLE


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it. Opens every shard, so a truncated one is named.

    Raises:
        ValueError: a file is missing, truncated or no safetensors file.
    """
    files = [folder / name for name in _shards(folder)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} lacks {file.name}: the folder is incomplete")
    return tensor_files(files)


def tensor_files(files: Iterable[str | Path]) -> dict[str, Path]:
    """Tensor name -> the file that holds it, of weight files that exist.

    Raises:
        ValueError: a file is truncated or no safetensors file.
    """
    stored: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                stored.update(dict.fromkeys(file.keys(), Path(path)))
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    return stored


def _shards(folder: Path) -> list[str]:
    """The weight files, chosen as transformers does: one file before an index of many."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return [SINGLE]
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is truncated or no index of shards: {error!r}") from error


def some(names: Iterable[str]) -> str:
    """The first three names and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
