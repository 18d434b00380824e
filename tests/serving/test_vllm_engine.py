"""The command line that vLLM's own server gets."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_tools.cli.main import main
from moe_tools.serving import vllm_engine
from moe_tools.serving.vllm_engine import VllmSettings, command


def test_our_options_become_vllms(folders: Path) -> None:
    source = str(folders / "routed")
    settings = VllmSettings(source, "127.0.0.1", 9, dtype="bf16", slots=4, more=["--seed", "1"])
    expected = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", source]
    expected += ["--host", "127.0.0.1", "--port", "9", "--served-model-name", "routed", source]
    expected += ["--dtype", "bfloat16", "--max-num-seqs", "4", "--seed", "1"]
    assert command(settings) == expected


def test_the_process_becomes_vllm_and_the_key_stays_out_of_sight(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[Any] = []
    monkeypatch.setattr(vllm_engine, "find_spec", lambda _: object())
    monkeypatch.setattr(os, "execve", lambda *args: became.append(args))
    monkeypatch.setenv("MOE_TOOLS_API_KEY", "sesame")
    words = [
        "serve",
        str(folders / "routed"),
        "--engine",
        "vllm",
        "--name",
        "x",
        "--",
        "--seed",
        "1",
    ]
    assert main(words) == 0
    ((program, words, environment),) = became
    assert program == sys.executable
    assert words[-2:] == ["--seed", "1"]
    assert environment["VLLM_API_KEY"] == "sesame"
    assert "sesame" not in words


def test_without_vllm_it_says_how_to_get_it(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda _: None)
    assert main(["serve", str(folders / "routed"), "--engine", "vllm"]) == 2
    assert capsys.readouterr().err == (
        "moe-tools: --engine vllm needs vllm, which is not installed: pip install vllm\n"
    )


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no model folder: it has no config"):
        command(VllmSettings(str(tmp_path), "127.0.0.1", 9))
