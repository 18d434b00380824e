"""Whatever stands beside a donor's weights stands beside the converted ones, and works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from moe_tools.checkpoint.companions import companions, put_beside
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.recipe import Attach, Recipe, Split
from moe_tools.runs.run import run
from tests.families import build
from tests.tiny import build_tokenizer, write_passages

TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
FILES = {
    "preprocessor_config.json": '{"size": 28}',
    "processor_config.json": "{}",
    "tekken.json": "{}",
    "tokenizer.model": "\x00sentences",
    "LICENSE": "as you like",
    "chat_template.json": '{"chat_template": "old"}',
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../other"}]),
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
}
NOT_KEPT = ("params.json", "training_args.bin", "extra.py", "card.md")


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    tokenizer, model = build_tokenizer(), build("llama")
    tokenizer.chat_template = TEMPLATES
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=[1, 2])
    folder = tmp_path / "donor"
    save(model, folder, tokenizer)
    (folder / "1_Pooling").mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(content)
    for name in NOT_KEPT:
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("keep_steps", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_they_come_along(donor: Path, stream: bool, keep_steps: bool, tmp_path: Path) -> None:
    write_passages(tmp_path / "text.txt", 100)
    steps = (Split(expert_size=8, tokens=64), Attach(tokens=64))
    recipe = Recipe("test", steps, data=str(tmp_path / "text.txt"), block_length=16)
    output = run(
        recipe, str(donor), tmp_path / "out", control=False, keep_steps=keep_steps, stream=stream
    )
    for name, content in FILES.items():
        assert (output / name).read_text() == content
    assert not any((output / name).exists() for name in NOT_KEPT)
    assert AutoTokenizer.from_pretrained(output).chat_template == TEMPLATES
    generation = load(output).generation_config
    assert (generation.max_new_tokens, generation.eos_token_id) == (7, [1, 2])


def test_what_is_there_stays(donor: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "LICENSE").write_text("mine")
    (donor / "adapter_config.json").write_text("{}")
    put_beside(companions(str(donor)), other)
    assert (other / "LICENSE").read_text() == "mine"
    assert (other / "1_Pooling" / "config.json").is_file()
    assert not (other / "adapter_config.json").exists()


def test_a_folder_that_listed_modules_point_to_outside_is_left_alone(
    donor: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "secret").write_text("mine")
    put_beside(companions(str(donor)), tmp_path / "new" / "place")
    assert not [file for file in tmp_path.rglob("secret") if file.parent.name != "other"]


def test_an_id_that_is_nowhere_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put_beside(companions("nobody/nothing"), tmp_path)
    assert "only its model and its tokenizer are kept" in caplog.text
    assert not list(tmp_path.iterdir())
