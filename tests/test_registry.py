"""A name finds a thing; a wrong name gets a suggestion."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest

from moe_tools.registry import Registry, check_arguments, unknown

COLOURS = Registry("colour", {"red": 1, "green": 2})


@dataclass
class Circle:
    radius: float
    corners: int | None = None
    name: Any = "circle"


class Broken:
    def __init__(self, size: int) -> None:
        self.size = size + None  # type: ignore[operator]


class Point:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise TypeError("it takes none of them")


SHAPES = Registry("shape", {"circle": Circle, "broken": Broken, "point": Point})


def test_a_registry_is_a_mapping() -> None:
    assert COLOURS["red"] == 1
    assert dict(COLOURS) == {"red": 1, "green": 2}
    assert list(COLOURS) == ["red", "green"]
    assert len(COLOURS) == 2


def test_asking_whether_a_name_is_known_is_no_error() -> None:
    assert "red" in COLOURS
    assert "blue" not in COLOURS
    assert "blue" not in COLOURS.keys()  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gren", "unknown colour 'gren'; did you mean 'green'? (known: green, red)"),
        ("xyz", "unknown colour 'xyz' (known: green, red)"),
        ("", "unknown colour '' (known: green, red)"),
    ],
    ids=["near", "far", "empty"],
)
def test_a_wrong_name_gets_a_suggestion_where_one_is_close(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        COLOURS[name]


def test_an_empty_registry_says_so() -> None:
    assert str(unknown("colour", "red", ())) == "unknown colour 'red' (known: none)"


def test_later_changes_to_the_source_do_not_reach_the_registry() -> None:
    source = {"red": 1}
    registry = Registry("colour", source)
    source["blue"] = 3
    assert "blue" not in registry


def test_of_many_names_only_some_are_listed() -> None:
    message = str(unknown("FFN", "layers.7", (f"layer.{index}" for index in range(256))))
    assert "did you mean 'layer.7'?" in message
    assert message.endswith(" and 216 more)")
    assert message.count("layer.") == 41  # the suggestion, too


def test_a_thing_is_built_from_its_entry() -> None:
    assert SHAPES.build({"kind": "circle", "radius": 2}) == Circle(2)
    assert SHAPES.build({"kind": "circle", "radius": 0.5, "corners": 3}) == Circle(0.5, 3)
    assert SHAPES.build({"kind": "circle", "radius": 0.5, "name": None}).name is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "circl"}, "unknown shape 'circl'; did you mean 'circle'"),
        ({}, "unknown shape ''"),
        (
            {"kind": "circle", "radius": 1, "colour": 2},
            "shape {'kind': 'circle', 'radius': 1, 'colour': 2}: got an unexpected keyword "
            "argument 'colour' (it takes radius, corners, name)",
        ),
        (
            {"kind": "circle"},
            "shape {'kind': 'circle'}: missing a required argument: 'radius' (it takes ",
        ),
        (
            {"kind": "point", "x": 1},
            "shape {'kind': 'point', 'x': 1}: got an unexpected keyword argument 'x' (it takes no "
            "arguments)",
        ),
    ],
)
def test_arguments_that_a_kind_does_not_take_are_a_mistake(
    entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SHAPES.build(entry)


def test_an_error_inside_a_constructor_stays_what_it_is() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        SHAPES.build({"kind": "broken", "size": 3})


def test_arguments_beside_those_that_are_given_anyway() -> None:
    def build(width: int, routed: int, rank: int = 8, scale: Unknown = 1) -> None:  # noqa: F821
        raise AssertionError("it is only asked what it takes")

    check_arguments(build, {"rank": 4}, "router x", given=2)
    message = r"^router x: got an unexpected keyword argument 'bias' \(it takes rank, scale\)$"
    with pytest.raises(ValueError, match=message):
        check_arguments(build, {"bias": 1}, "router x", given=2)
    with pytest.raises(ValueError, match="multiple values for argument 'width'"):
        check_arguments(build, {"width": 1}, "router x", given=2)


@pytest.mark.parametrize("name", [["a"], {}, 3, None, float("nan")])
def test_what_is_no_name_is_unknown(name: Any) -> None:
    """As YAML and JSON may give it."""
    with pytest.raises(ValueError, match="unknown thing "):
        Registry("thing", {"one": 1})[name]
