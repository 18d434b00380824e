"""The command line, as a user types it in a folder of tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.experts.conversion import Conversion
from tests.families import EXPERT_SIZE, build, randomize, routed
from tests.tiny import Run, build_tokenizer, passages, write_passages

SELECTOR = {"kind": "threshold", "tau": 0.5}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, donor/, out/ (a routed copy) and out/control/; a test file may have its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work")
    write_passages(folder / "text.txt", 200)
    donor, tokenizer = build("llama"), build_tokenizer()
    save(donor, folder / "donor", tokenizer)
    conversion = Conversion(str(folder / "donor"), EXPERT_SIZE, "sigmoid", SELECTOR)
    model, _ = routed(donor, conversion)
    randomize(model)
    save(model, folder / "out", tokenizer)
    save(build("llama"), folder / "out" / "control", tokenizer)
    for place, tokens in (("out", 1000), ("out/control", 1200)):
        (folder / place / "metrics.json").write_text(json.dumps({"train_tokens": tokens}))
    return folder


@pytest.fixture(autouse=True)
def docs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source `docs` of few words, for verbs that are told no other: no wheel is fetched."""
    text = {"train": passages(2000), "heldout": passages(3000)[2000:]}
    monkeypatch.setattr("moe_tools.data.sources.docs", text.__getitem__)


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`moe-tools` in `work`: exit code, standard output, standard error."""
    monkeypatch.chdir(work)

    def call(*words: str) -> tuple[int, str, str]:
        return main(words), *capsys.readouterr()

    return call
