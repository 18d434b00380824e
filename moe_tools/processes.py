"""The processes of one run, as `torchrun` or `deepspeed` starts them; a plain start is one process.

Imports torch only where it is used: the command line asks who it is before it does anything.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")

SILENCE = timedelta(minutes=30)
"""How long a process waits for the others where all do the same work, as in training: one that is
not heard of for longer hangs."""
PATIENCE = timedelta(days=2)
"""How long the others wait while the first works alone: a split of a large model takes hours. Of a
process that died they hear at once, over its closed connection."""

_patient: ProcessGroup | None = None
"""The group over which the others wait for the first; `process_group` makes it."""


def rank() -> int:
    """Returns the number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def count() -> int:
    """Returns the number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Returns the number of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0


@contextmanager
def process_group(
    device: str,
    *,
    alone: bool = False,
    silence: timedelta = SILENCE,
    patience: timedelta = PATIENCE,
) -> Iterator[None]:
    """Connects the processes while it lasts: over gloo, and over NCCL for what is on a GPU.

    Args:
        device: cpu or cuda.
        alone: make a group even of one process; DeepSpeed asks for one.
        silence: see `SILENCE`.
        patience: see `PATIENCE`.
    """
    global _patient
    if count() == 1 and not alone:
        yield
        return
    from torch import distributed

    added = {} if count() > 1 else _of_one(device)
    os.environ.update(added)
    try:
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, timeout=silence)
        _patient = distributed.new_group(backend="gloo", timeout=patience) if count() > 1 else None
        yield
    finally:
        _patient = None
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for name in added:
            del os.environ[name]


def _of_one(device: str) -> dict[str, str]:
    """Returns what a launcher would say to a single process on a device."""
    index = device.partition(":")[2] or "0"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {"RANK": "0", "LOCAL_RANK": index, "WORLD_SIZE": "1", **place}


def on_first(work: Callable[[], T]) -> T:
    """Lets the first process alone do `work`, and returns in all of them what it returned.

    The others wait for it as long as `PATIENCE`, but only `SILENCE` for it to begin.

    Raises:
        ValueError: the first process's, in all of them; another error of it is one in the others.
    """
    if count() == 1:
        return work()
    from torch import distributed

    barrier()
    said: list[T | ValueError | None] = [None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            said = [work()]
        except Exception as error:
            failure = error
            wrong = error if isinstance(error, ValueError) else None
            said = [wrong or ValueError(f"the first process failed: {error}")]
    distributed.broadcast_object_list(said, src=0, group=_patient)
    if failure is not None:
        raise failure
    (answer,) = said
    if isinstance(answer, ValueError):
        raise answer
    return answer  # type: ignore[return-value]


def barrier() -> None:
    """Waits until every process is here."""
    if count() > 1:
        import torch
        from torch import distributed

        distributed.all_reduce(torch.zeros((), device="cpu"))  # `distributed.barrier` takes a GPU


def gather_rows(values: Tensor) -> Tensor:
    """Returns the rows of all processes, joined; each may have another number of them."""
    if count() == 1:
        return values
    import torch
    from torch import distributed

    mine = torch.tensor([len(values)], device=values.device)
    lengths = [torch.empty_like(mine) for _ in range(count())]
    distributed.all_gather(lengths, mine)
    longest = max(int(length) for length in lengths)
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: len(values)] = values
    found = [torch.empty_like(padded) for _ in range(count())]
    distributed.all_gather(found, padded)
    return torch.cat([rows[: int(n)] for rows, n in zip(found, lengths, strict=True)])


def average_(tensors: Sequence[Tensor]) -> None:
    """Makes each tensor its mean over the processes, in place; all have tensors of these shapes."""
    if count() == 1:
        return
    from torch import distributed

    for sent in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
        sent.wait()
    for tensor in tensors:
        tensor.div_(count())


def all_agree(holds: bool) -> bool:
    """Returns whether `holds` is true in every process."""
    if count() == 1:
        return holds
    import torch

    return bool(gather_rows(torch.tensor([holds], dtype=torch.uint8)).all())
