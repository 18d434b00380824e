"""What the documentation says is run: the tutorial top to bottom, every command at least parsed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from moe_tools.cli.main import _Parser, main
from moe_tools.recipe import parse_recipe
from tests.runs.test_run import LENGTH
from tests.runs.test_run import work as work

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every fenced block."""
    yield from FENCE.findall(page.read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """The words of each moe-tools command in a block, comments and pipes cut off."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("moe-tools ")]
    return [each[1 : each.index(">")] if ">" in each else each[1:] for each in words]


COMMANDS = [
    pytest.param(words, id=f"{page.stem}:{' '.join(words)}")
    for page in PAGES
    for _, text in blocks(page)
    for words in commands(text)
    if words[0].islower() and words[0][0] != "-"
]


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_one(words: list[str]) -> None:
    parser = _Parser(prog="moe-tools")
    import_module(f"moe_tools.cli.{words[0]}").add_arguments(parser)
    own = words[: words.index("--")] if "--" in words else words  # the rest is another program's
    parser.parse_args(own[1:])


@pytest.mark.slow
def test_the_tutorial_runs_from_top_to_bottom(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny donor and little text in place of SmolLM2 and the documentation of packages."""
    text = f"--data {work / 'text.txt'}"
    small = {
        "SmolLM2-135M-Instruct.Q4_1.gguf": str(work / "donor"),
        "--tokens 32_768": f"--tokens 2048 --block-length {LENGTH} {text} --eval-tokens 256",
        "--tokens 8192": f"--tokens 256 --block-length {LENGTH} {text}",
        "--tokens 32\n": "--tokens 4 --prompt-tokens 8 --repeats 1\n",
        ".gguf\n": f".gguf {text}\n",
    }
    monkeypatch.chdir(tmp_path)
    page, names, ran = ROOT / "docs" / "tutorial.md", dict[str, Any](), 0
    shrunk = page.read_text()
    for long, short in reversed(small.items()):
        assert long in shrunk
        shrunk = shrunk.replace(long, short)
    for language, block in FENCE.findall(shrunk):
        if language == "sh":
            for words in commands(block):
                assert main(words) == 0, words
                ran += 1
        elif language == "python":
            exec(compile(block, str(page), "exec"), names)
            ran += 1
    assert ran == 12  # nine commands, three pieces of Python
    assert "## Figures" in (tmp_path / "fast" / "README.md").read_text()


def test_the_recipe_of_the_reference_is_a_recipe() -> None:
    import yaml

    (text,) = (text for kind, text in blocks(ROOT / "docs" / "recipe.md") if kind == "yaml")
    recipe = parse_recipe(yaml.safe_load(text))
    assert [type(step).__name__ for step in recipe.steps] == ["Split", "Attach", "Train"]
