"""Models and teachers in shards from the start, and checkpoints that go on in other processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from tests.cli.test_convert import tokenizer
from tests.training.test_distributed import figures, start, weights
from tests.training.two_processes import MOVED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def born(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each train step on a model that came in shards, and on one that came whole."""
    folder = tmp_path_factory.mktemp("born")
    done = start(2, "born", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("step", ["taught", "lora", "experts", "fused"])
def test_a_model_born_in_shards_ends_as_one_that_came_whole(step: str, born: Path) -> None:
    """Bit by bit, in bf16 with fp32 routers, with adapters, of an MoE host, and with a teacher
    that is in shards as well."""
    whole, shards = born / f"{step}-whole", born / f"{step}-born"
    assert figures(shards) == figures(whole)
    mine, theirs = weights(shards), weights(whole)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of a teacher in memory, and of the same on disk, in every way."""
    folder = tmp_path_factory.mktemp("cached")
    done = start(2, "cached", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("way", ["plain", "zero3"])
def test_two_processes_read_what_the_first_wrote_of_a_teacher(way: str, cached: Path) -> None:
    memory, disk = cached / f"{way}-whole", cached / f"{way}-cached"
    assert figures(disk) == pytest.approx(figures(memory), rel=2e-3)
    mine, theirs = weights(disk), weights(memory)
    for name, value in mine.items():
        assert (value - theirs[name]).abs().max() < 5e-4, name


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in one process and gone on in two, and the other way round."""
    folder = tmp_path_factory.mktemp("moved")
    for count in (1, 2, 1):
        done = start(count, "moved", str(folder))
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("way", MOVED)
@pytest.mark.parametrize("killed", ["by one", "by two"])
def test_another_number_of_processes_goes_on(way: str, killed: str, gone_on: Path) -> None:
    """Host and routers learn at rates of their own, and each has its own count of steps."""
    through, resumed = gone_on / way / "through", gone_on / way / killed
    assert figures(resumed) == pytest.approx(figures(through), abs=1e-5)
    mine, theirs = weights(resumed), weights(through)
    for name, value in mine.items():
        assert (value - theirs[name]).abs().max() < 2e-6, name


RECIPE = """
name: routers
block_length: 16
steps:
  - train: {mode: soft, parts: routers, tokens: 32, batch_size: 1}
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """donor/, a routed model of 235 MB; text.txt, recipe.yaml."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=512,
        max_position_embeddings=64,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    attach_experts(model, Conversion("donor", 64, "sigmoid", {"kind": "threshold", "tau": 0.5}))
    save(model, folder / "donor", tokenizer())
    (folder / "text.txt").write_text("\n\n".join(["one two three four five six"] * 40))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def test_two_processes_hold_one_copy_between_them(large: Path) -> None:
    """Each of them a half while it loads, the first one all of it at the end.

    Loaded whole, they hold three copies: two whole ones, and the shares that are made of them.
    """
    words = ["--model", "donor", "--output", "out", "--data", "text.txt", "--deepspeed", "zero3"]
    done = start(
        *(2, "command", "train", "recipe.yaml", *words, "--device", "cpu"),
        cwd=large,
        MOE_TOOLS_TEST_MEMORY=str(large),
        MALLOC_MMAP_THRESHOLD_="65536",  # what is freed goes back at once
    )
    assert done.returncode == 0, done.stderr[-3000:]
    size = (large / "donor" / "model.safetensors").stat().st_size
    took = [json.loads((large / f"{rank}.json").read_text()) for rank in range(2)]
    loading, ending = ([each[when] / size for each in took] for when in ("load", "end"))
    assert sum(loading) < 2.2, took  # 0.3 of it each are libraries
    assert ending[1] < 1.3, took
    assert (large / "out" / "model.safetensors").stat().st_size == size
