"""Writes the weights of a folder in shards, with one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from moe_tools.checkpoint.shards import write_index
from moe_tools.data.progress import progress
from moe_tools.names import SINGLE

SHARD = 128 * 2**20
"""Bytes from which a shard is full."""

Group = Callable[[], dict[str, Tensor]]
"""Makes some tensors: a layer, say."""


def write_shards(folder: Path, groups: Sequence[Group]) -> None:
    """Writes tensors that are made group by group, each group whole in one shard.

    A shard is written once it has `SHARD` bytes, so that shard and group are all that is in memory.
    """
    paths: list[Path] = []
    with progress("write", len(groups), "part") as bar:
        for tensors in _gathered(groups, bar.update):
            path = folder / f"{len(paths)}.safetensors"
            save_file(tensors, path, metadata={"format": "pt"})
            paths.append(path)
    if len(paths) == 1:
        paths[0].rename(folder / SINGLE)
        return
    for number, path in enumerate(paths, start=1):
        path.rename(folder / f"model-{number:05d}-of-{len(paths):05d}.safetensors")
    write_index(folder)


def _gathered(
    groups: Sequence[Group], made: Callable[[int], object]
) -> Iterator[dict[str, Tensor]]:
    """The tensors of several groups, as many as make a shard."""
    shard: dict[str, Tensor] = {}
    for group in groups:
        shard |= {name: tensor.contiguous() for name, tensor in group().items()}
        made(1)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD:
            yield shard
            shard = {}
    if shard:
        yield shard
