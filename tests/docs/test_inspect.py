"""The code of docs/inspect.md runs, block by block, as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_tools.checkpoint.saving import save
from tests.cli.test_verbs import WORDS, build_tokenizer
from tests.families import build, randomize, routed

PAGE = Path(__file__).parents[2] / "docs" / "inspect.md"


def test_the_how_to_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = routed(build("llama"))
    randomize(model)
    save(model, tmp_path / "out", build_tokenizer(WORDS))
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {
        "FOLDER": str(tmp_path / "out"),
        "TEXT": "w1 w2 w3 w4",
        "SENTENCE": "w1 w2 w3",
        "LAYER": 1,
        "EXPERT": 2,
    }
    for block in code:
        exec(block, names)
    assert len(code) == 5
    out = capsys.readouterr().out
    assert "w1" in out and "nats a token" in out
