"""Stock MoE folders that `moe-tools export --to moe` wrote, in vLLM's own classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.export import export
from tests.export.hosts import converted, host
from tests.vllm.conftest import in_vllm
from tests.vllm.test_served import far, job, logprobs, tokens

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

SOFTMAX = {"router": "softmax", "mode": "weighted", "shared_experts": 0}
SIGMOID = {"router": "sigmoid", "mode": "weighted", "router_options": {"bias": False}}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: converted(host(tie_word_embeddings=True)),
    "qwen2": lambda: converted(host("qwen2")),
    "qwen3": lambda: converted(host("qwen3"), shared_experts=0),
    "softmax": lambda: converted(host(), **SOFTMAX),
    "sigmoid": lambda: converted(host(), **SIGMOID),
}
CLASSES = {"softmax": "MixtralForCausalLM"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported")
    for name, make in MODELS.items():
        save(make(), place / name / "ours")
        export(place / name / "ours", place / name / "stock", to="moe")
    return place


@pytest.fixture(scope="module")
def served(folders: Path) -> dict[str, Any]:
    jobs = {name: job(folders / name / "stock") for name in MODELS}
    return in_vllm(jobs, folders, VLLM_PLUGINS="")  # nothing of ours is there


@pytest.mark.parametrize("name", MODELS)
def test_vllm_says_what_transformers_says(name: str, folders: Path, served: dict[str, Any]) -> None:
    said, stock = served[name], load(folders / name / "stock", dtype=torch.float32)
    assert said.get("error") is None
    assert said["class"] == CLASSES.get(name, "Glm4MoeForCausalLM")
    assert said["tokens"] == tokens(stock)
    assert far(said, logprobs(stock)) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_and_what_the_converted_model_says(
    name: str, folders: Path, served: dict[str, Any]
) -> None:
    ours = load(folders / name / "ours", dtype=torch.float32)
    exact = name in ("softmax", "sigmoid")
    assert served[name]["tokens"] == tokens(ours)
    assert far(served[name], logprobs(ours)) < (1e-4 if exact else 5e-2)
