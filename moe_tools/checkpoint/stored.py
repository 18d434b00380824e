"""Finds the weight files of a model folder, and which tensor is in which."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moe_tools.checkpoint.broken import reason
from moe_tools.names import INDEX, SINGLE
from moe_tools.registry import short

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of weights as torch.save writes them."""


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it. Opens every shard, so a truncated one is named.

    Raises:
        ValueError: a file is missing, truncated or no safetensors file; the folder holds another
            kind of weights, or names files outside.
    """
    files = [folder / name for name in _shards(folder)]
    for file in files:
        if not file.is_file():
            raise ValueError(
                _instead(folder) or f"{folder} lacks {file.name}: the folder is incomplete"
            )
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
            raise ValueError(
                f"{path} is truncated or no safetensors file: {reason(error)}"
            ) from error
    return stored


def _shards(folder: Path) -> list[str]:
    """The weight files, chosen as transformers does: one file before an index of many."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return [SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if not _is_below(name)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is truncated or no index of shards: {error!r}") from error
    if outside:
        raise ValueError(
            f"{index} names {short(outside[0])}: a shard is in the folder of its index, or below"
        )
    return names


def _is_below(name: str) -> bool:
    """Whether a name may be that of a file in a folder, or below."""
    path = Path(name)
    return (
        not path.is_absolute() and ".." not in path.parts and "\0" not in name and len(name) < 256
    )


def _instead(folder: Path) -> str | None:
    """What a folder without safetensors weights holds in their place, and the way out."""
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if any(name.startswith("adapter_") for name in files):
        return (
            f"{folder} holds adapters alone, and no model: load them on their base model by PEFT, "
            "merge_and_unload, and save that"
        )
    if gguf := [name for name in files if name.endswith(".gguf")]:
        return f"{folder} holds GGUF files: give one of them, e.g. {folder / gguf[0]}"
    if pickles := [name for name in files if Path(name).suffix in PICKLES]:
        return (
            f"{folder} has its weights as a pickle alone, {pickles[0]}, which may run code when it "
            "is read: if you trust it, write it as safetensors by transformers' from_pretrained "
            "and save_pretrained"
        )
    return None


def some(names: Iterable[str]) -> str:
    """The first three names and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
