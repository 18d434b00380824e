"""Whether the Python code that comes with a model may run: not unless the user says so.

transformers asks on standard input where it is told nothing; here it is always told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TRUSTED: ContextVar[bool] = ContextVar("remote code", default=False)


def is_trusted() -> bool:
    """Whether the code of any model that is loaded now may run."""
    return _TRUSTED.get()


@contextmanager
def trusted(on: bool = True) -> Iterator[None]:
    """While it lasts, the code that comes with a model may run; `on=False` changes nothing."""
    token = _TRUSTED.set(on or is_trusted())
    try:
        yield
    finally:
        _TRUSTED.reset(token)
