"""Puts a class of ours in front of the class of a host's module, which keeps all that it holds.

The module stays an instance of the host's class. What was prepared for it is made when it is
wanted: copies, pickles and casts leave it out.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast

from torch import nn


class InFront(nn.Module):
    """What can be put in front."""

    host: ClassVar[type[nn.Module]]
    """The class behind it."""
    made: ClassVar[tuple[str, ...]]
    """Attributes that are made when they are wanted."""

    def _apply(self, *args: Any, **options: Any) -> Any:
        """Forgets what was made where tensors are cast or moved."""
        for name in self.made:
            self.__dict__.pop(name, None)
        applied: Any = super()._apply
        return applied(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what was made."""
        return {name: value for name, value in self.__dict__.items() if name not in self.made}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Names both classes: their joint one is made while the program runs."""
        ours = type(self).__mro__[1]
        return _unpickled, (ours, self.host), self.__getstate__()


def put_in_front(ours: type[InFront], module: nn.Module) -> None:
    """Changes the class of a module, in place."""
    module.__class__ = _joint(cast("Any", ours), cast("Any", type(module)))


@functools.cache
def _joint(ours: type[InFront], host: type[nn.Module]) -> type[InFront]:
    names = {"__module__": host.__module__, "host": host}
    return cast("type[InFront]", type(host.__name__, (ours, host), names))


def _unpickled(ours: type[InFront], host: type[nn.Module]) -> nn.Module:
    kind = _joint(cast("Any", ours), cast("Any", host))
    return kind.__new__(kind)
