"""A name finds a thing; a wrong name gets a suggestion."""

import re

import pytest

from moe_tools.registry import Registry, unknown

COLOURS = Registry("colour", {"red": 1, "green": 2})


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
