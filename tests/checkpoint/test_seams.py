"""Functions around other people's: put on and taken off, whoever else does the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from moe_tools.checkpoint.seams import Once, Seam


def host() -> type[Any]:
    class Host:
        def say(self) -> list[str]:
            return ["host"]

    return Host


def around(word: str) -> Callable[[Any], Any]:
    return lambda held: lambda self: [word, *(held(self) if held else [])]


def test_it_goes_without_a_trace() -> None:
    owner = host()
    before = dict(vars(owner))
    seam = Seam(owner, "say", around("ours"))
    seam.put()
    seam.put()
    assert owner().say() == ["ours", "host"]
    seam.take()
    seam.take()
    assert dict(vars(owner)) == before


def test_what_the_class_does_not_hold_itself() -> None:
    owner = type("Child", (host(),), {})
    for name, expected in (("say", ["ours", "host"]), ("new", ["ours"])):
        seam = Seam(owner, name, around("ours"))
        seam.put()
        assert getattr(owner(), name)() == expected
        seam.take()
        assert name not in vars(owner)


def test_a_wrapper_that_came_later_stays() -> None:
    owner = host()
    ours, theirs = (Seam(owner, "say", around(word)) for word in ("ours", "theirs"))
    ours.put()
    theirs.put()
    ours.take()
    assert owner().say() == ["theirs", "ours", "host"]
    ours.put()
    assert owner().say() == ["ours", "theirs", "ours", "host"]
    ours.take()
    theirs.take()
    ours.take()
    assert owner().say() == ["host"]


def test_what_replaced_it_is_wrapped_on_demand_alone() -> None:
    owner = host()
    seam = Seam(owner, "say", around("ours"))
    seam.put()
    owner.say = lambda self: ["theirs"]
    seam.put()
    assert owner().say() == ["theirs"]
    seam.put(on_top=True)
    seam.put(on_top=True)
    assert owner().say() == ["ours", "theirs"]
    seam.take()
    assert owner().say() == ["theirs"]


def test_the_outermost_call_on_a_thing_is_one_in_each_thread() -> None:
    once, thing, other = Once(), object(), object()
    seen: list[bool] = []

    def look() -> None:
        with once.outermost(thing) as outermost:
            seen.append(outermost)

    with once.outermost(thing) as first:
        with once.outermost(thing) as nested, once.outermost(other) as another:
            assert (first, nested, another) == (True, False, True)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    look()
    assert seen == [True, True]
