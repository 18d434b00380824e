"""Whether plain data, as JSON gives it, is what an annotation says."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: all the way down, but for which word it is.

    The words of a `Literal` are the business of whoever knows what is close to a wrong one.
    """
    kind, inside = get_origin(hint), get_args(hint)
    if hint is Any or kind is Literal:
        return True
    if kind in (Union, UnionType):
        return any(fits(value, each) for each in inside)
    if kind is list:
        return isinstance(value, list | tuple) and all(fits(each, inside[0]) for each in value)
    if kind is dict:
        return isinstance(value, dict) and all(
            fits(key, inside[0]) and fits(each, inside[1]) for key, each in value.items()
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, hint)
