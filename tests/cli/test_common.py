"""Devices and dtypes, as the verbs choose them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_tools.cli.common import pick_dtype, use_device
from moe_tools.cli.main import main


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with two GPUs that hold nothing: what is asked of them, in order."""
    asked: list[str] = []

    def empty(size: int, device: torch.device) -> None:
        if (device.index or 0) > 1:
            raise RuntimeError("CUDA error: invalid device ordinal\nCompile with ...")
        asked.append(f"tensor on {device}")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: asked.append(f"current {index}"))
    return asked


def among(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    """This process is one of several that torchrun started."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("name", "device", "asked"),
    [
        ("cuda:1", "cuda:1", ["tensor on cuda:1", "current 1"]),
        ("cuda:0", "cuda:0", ["tensor on cuda:0", "current 0"]),
        ("cuda", "cuda", ["tensor on cuda"]),
        ("auto", "cuda", ["tensor on cuda"]),
        ("cpu", "cpu", ["tensor on cpu"]),
    ],
)
def test_a_numbered_gpu_becomes_the_current_one(
    name: str, device: str, asked: list[str], gpus: list[str]
) -> None:
    assert use_device(name) == device
    assert gpus == asked


@pytest.mark.parametrize("name", ["cuda", "auto"])
def test_of_several_processes_each_touches_its_own_gpu_alone(
    name: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    among(monkeypatch, rank=1, count=2)
    assert use_device(name) == "cuda:1"
    assert gpus == ["tensor on cuda:1", "current 1"]


def test_several_processes_do_not_share_one_gpu(
    gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    among(monkeypatch, rank=1, count=2)
    with pytest.raises(ValueError, match="--device cuda:0 is one GPU for 2 processes: use cuda"):
        use_device("cuda:0")
    assert use_device("cpu") == "cpu"


def test_a_gpu_that_is_not_there_is_a_mistake(gpus: list[str]) -> None:
    with pytest.raises(ValueError, match="--device cuda:7 cannot be used here: CUDA error: inval"):
        use_device("cuda:7")
    assert gpus == []


VERBS: dict[str, list[str]] = {
    "convert": ["--method", "lte", "--model", "m", "--output", "new"],
    "train": ["lte", "--model", "m", "--output", "new"],
    "compare": ["lte", "--model", "m", "--output", "new"],
    "grid": ["--model", "m", "--output", "new"],
    "evaluate": ["m"],
    "inspect": ["m", "--prompt", "a"],
    "generate": ["m", "--prompt", "a"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_makes_its_device_the_current_one(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def use(name: str) -> Any:
        raise ValueError(f"{name} becomes the current device")

    monkeypatch.setattr("moe_tools.cli.common.use_device", use)
    assert main([verb, *VERBS[verb], "--device", "cuda:1"]) == 2
    assert "cuda:1 becomes the current device" in capsys.readouterr().err


def test_auto_is_a_device_and_a_dtype_that_are_there() -> None:
    device = use_device("auto")
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_dtype("auto", device) in (torch.bfloat16, torch.float32)
    assert pick_dtype("fp32", device) == torch.float32
