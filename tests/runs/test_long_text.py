"""Texts too long for memory: a run that is killed anywhere goes on bit by bit as if it were not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_tools.checkpoint.saving import save
from tests.families import build
from tests.tiny import build_tokenizer, passages

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """donor/ and text.jsonl."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("long")
    save(build("llama", bos_token_id=1, eos_token_id=1), made / "donor", build_tokenizer())
    (made / "text.jsonl").write_text(
        "".join(json.dumps({"text": words}) + "\n" for words in passages(80))
    )
    return made


def start(
    folder: Path, home: Path, kind: str, when: str = "no", *launcher: str
) -> subprocess.CompletedProcess[str]:
    """One process of long_text.py, or what launches some; cache and output are below `home`."""
    script = str(ROOT / "tests" / "runs" / "long_text.py")
    own = {"XDG_CACHE_HOME": str(home / "cache"), "OUTPUT": str(home / "out")}
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **own}
    return subprocess.run(
        [sys.executable, *launcher, script, str(folder), kind, when],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("file", ["cache", "step:9"]),
        ("epochs", ["cache", "step:50"]),  # 37 steps are an epoch: in the second one
        ("stream", ["step:7", "step:9"]),
    ],
)
def test_a_killed_run_ends_bit_by_bit_as_one_that_was_not(
    folder: Path, tmp_path: Path, kind: str, kills: list[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = start(folder, whole, kind)
    assert done.returncode == 0, done.stderr[-3000:]
    for when in kills:
        died = start(folder, killed, kind, when)
        assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
        assert not (killed / "out" / "metrics.json").exists()
    again = start(folder, killed, kind)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout == done.stdout  # the same text
    one, other = (load_file(home / "out" / "model.safetensors") for home in (whole, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    caches = [home / "cache" / "moe_tools" / "text" for home in (whole, killed)]
    shards = [sorted(path.relative_to(cache) for path in cache.rglob("*.ids")) for cache in caches]
    assert len(shards[0]) > 1
    for name in set(shards[0]) & set(shards[1]):
        assert (caches[0] / name).read_bytes() == (caches[1] / name).read_bytes()


@pytest.mark.slow
def test_a_billion_tokens_take_no_memory(folder: Path, tmp_path: Path) -> None:
    """By two processes, three steps: each has the model, and reads its part of the text."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = start(folder, tmp_path, "billion", "step:3", *launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / "out" / f"{rank}.json").read_text())
        assert found["over"] < 600 * 2**20
    (cache,) = (tmp_path / "cache" / "moe_tools" / "text").iterdir()
    assert len([*cache.glob("*.ids")]) == 1  # of 239
