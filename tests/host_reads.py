"""Fails where the host waits for a number of the device, which no CUDA graph can hold."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    """Fails where a number, or a shape that depends on one, goes from the device to the host."""

    READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        assert not name.startswith(self.READS), f"the host reads the device: {func}"
        return func(*args, **(kwargs or {}))
