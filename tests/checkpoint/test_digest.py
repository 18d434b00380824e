"""A name for the weights of a donor: what changes it, and what does not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moe_tools.checkpoint.digest import digest
from moe_tools.checkpoint.saving import save
from tests.families import build


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "donor"
    save(build("llama"), folder)
    return folder


@pytest.fixture
def mine(donor: Path, tmp_path: Path) -> Path:
    """A copy elsewhere: other inodes, other times."""
    return shutil.copytree(donor, tmp_path / "mine", copy_function=shutil.copyfile)


def test_a_copy_is_the_same(donor: Path, mine: Path) -> None:
    os.utime(mine / "model.safetensors", (0, 0))
    (mine / "README.md").write_text("a card")
    (mine / "figures.json").write_text("[]")
    (mine / "control").mkdir()
    assert digest(str(mine)) == digest(str(donor))
    assert len(digest(str(donor))) == 16


def test_every_tensor_counts(donor: Path, mine: Path) -> None:
    """As after training, in which every number of a tensor moves."""
    state = load_file(donor / "model.safetensors")
    seen = {digest(str(donor))}
    for name, value in state.items():
        save_file({**state, name: value * 1.001}, mine / "model.safetensors", {"format": "pt"})
        seen.add(digest(str(mine)))
    assert len(seen) == len(state) + 1


def test_the_config_and_its_code_count(donor: Path, mine: Path) -> None:
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    other = digest(str(mine))
    (mine / "modeling_mine.py").write_text("x = 1")
    assert len({digest(str(donor)), other, digest(str(mine))}) == 3


def test_a_file_of_another_kind_is_looked_at_all_over(tmp_path: Path) -> None:
    file, seen = tmp_path / "model.gguf", set()
    for at in (None, 0, 500_000, 999_999):
        content = bytearray(1_000_000)
        if at is not None:
            content[at] = 1
        file.write_bytes(content)
        seen.add(digest(str(file)))
    assert len(seen) == 4
    file.write_bytes(b"GGUF")  # shorter than a page
    assert digest(str(file)) not in seen


def test_a_model_of_the_hub_is_its_commit(
    donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for commit in ("abc", "def"):
        shutil.copytree(donor, repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit)
        assert digest("someone/tiny") == commit


def test_a_shard_that_is_not_whole_is_named(mine: Path) -> None:
    file = mine / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        digest(str(mine))
