"""What `make` installs is in the locks, whole, and follows pyproject.toml and locks/*.in."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
EXTRA = {"main": "dev", "lowest": "test", "image": "test"}
"""Lock -> the extra of pyproject.toml that it installs."""
PINNED = re.compile(r"^([\w.-]+)==(\S+)(.*(?:\n .*)*)", re.MULTILINE)


def pins(name: str) -> dict[str, str]:
    """Package -> version of one file."""
    text = (LOCKS / name).read_text()
    return {canonicalize_name(found[1]): found[2] for found in PINNED.finditer(text)}


def asked(extra: str) -> Iterator[Requirement]:
    """What moe-tools and one of its extras name, with the extras inside it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    waiting = ["", extra]
    for name in waiting:
        for each in map(Requirement, lists[name]):
            if each.name == "moe-tools":
                waiting += sorted(each.extras)
            else:
                yield each


def lines(name: str) -> list[Requirement]:
    """The requirements of a file that a person writes."""
    text = (LOCKS / name).read_text()
    bare = (line.split("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in bare if line]


@pytest.mark.parametrize("name", ["main.txt", "lowest.txt", "image.txt", "models.txt"])
def test_every_package_of_a_lock_has_a_version_and_hashes(name: str) -> None:
    text = (LOCKS / name).read_text()
    named = re.findall(r"^[^\s#].*", text, re.MULTILINE)
    found = list(PINNED.finditer(text))
    assert len(found) == len(named) > 1
    for each in found:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", each[3]), each[1]


@pytest.mark.parametrize("name", EXTRA)
def test_torch_and_what_one_build_of_it_brings_is_in_no_lock(name: str) -> None:
    assert not [each for each in pins(f"{name}.txt") if re.match(r"torch$|nvidia-|cuda-", each)]
    (torch,) = (str(each) for each in lines(f"{name}.in") if each.name == "torch")
    assert torch in (LOCKS / f"{name}-cuda.txt").read_text().splitlines()[0]


@pytest.mark.parametrize("name", EXTRA)
def test_a_lock_follows_what_people_wrote(name: str) -> None:
    locked = pins(f"{name}.txt") | {"torch": pin_of_torch(name)}
    for each in [*asked(EXTRA[name]), *lines(f"{name}.in")]:
        version = locked.get(canonicalize_name(each.name))
        assert version is not None, f"{each} is in no lock: tools/lock --keep"
        assert version in each.specifier, f"{each}, but {version} is locked: tools/lock --keep"


def pin_of_torch(name: str) -> str:
    (version,) = re.findall(r"^torch==(\S+)", (LOCKS / f"{name}.in").read_text(), re.MULTILINE)
    return str(version)


def test_the_models_are_those_that_were_asked_for() -> None:
    assert pins("models.txt") == {
        canonicalize_name(each.name): next(iter(each.specifier)).version
        for each in lines("models.in")
    }
