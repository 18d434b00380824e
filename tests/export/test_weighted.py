"""Models whose scores multiply their experts: stock MoEs say these exactly, without a trick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.export import Options, export
from tests.export.hosts import HOSTS, converted, donor_gguf, folder, host
from tests.export.llama_cpp import greedy
from tests.export.test_llama_cpp import PROMPT, REAL, ours
from tests.export.test_moe import logits, stock
from tests.families import stored_shapes

SOFTMAX = {"router": "softmax", "mode": "weighted", "shared_experts": 0}
SIGMOID = {"router": "sigmoid", "mode": "weighted", "router_options": {"bias": False}}
UNBIASED = {"router": "sigmoid", "shared_experts": 0, "router_options": {"bias": False}}


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() <= 1e-5 * other.norm())


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_softmax_weights_are_mixtral(family: str, tied: bool, tmp_path: Path) -> None:
    save(converted(host(family, tie_word_embeddings=tied), **SOFTMAX), tmp_path / "in")
    figures = export(tmp_path / "in", tmp_path / "out", to="moe").figures
    assert figures is not None and figures.sets_equal == 1.0 and figures.error <= 1e-5
    model = stock(tmp_path / "out")
    assert type(model).__name__ == "MixtralForCausalLM"
    assert ("lm_head.weight" in stored_shapes(tmp_path / "out")) is not tied
    assert close(logits(model), logits(load(tmp_path / "in")))


@pytest.mark.parametrize("family", HOSTS)
def test_sigmoid_weights_are_glm4(family: str, tmp_path: Path) -> None:
    folder(tmp_path / "in", family, **SIGMOID)
    figures = export(tmp_path / "in", tmp_path / "out", to="moe").figures
    assert figures is not None and figures.sets_equal == 1.0 and figures.error <= 1e-5
    assert type(stock(tmp_path / "out")).__name__ == "Glm4MoeForCausalLM"
    assert close(logits(stock(tmp_path / "out")), logits(load(tmp_path / "in")))


def test_without_bias_and_shared_experts_it_is_mixtral(tmp_path: Path) -> None:
    folder(tmp_path / "in", **UNBIASED)
    figures = export(tmp_path / "in", tmp_path / "out", to="moe").figures
    assert figures is not None and figures.sets_equal is not None
    assert figures.sets_equal >= 0.99 and figures.error <= 2e-3
    assert type(stock(tmp_path / "out")).__name__ == "MixtralForCausalLM"


@pytest.mark.parametrize("changes", [SOFTMAX, SOFTMAX | {"shared_experts": 2}, SIGMOID])
def test_llama_cpp_says_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    save(converted(host(**REAL), **changes), tmp_path / "in")
    options = Options(type="f32", tokenizer=str(donor_gguf()))
    figures = export(tmp_path / "in", tmp_path / "m.gguf", to="gguf", options=options).figures
    assert figures is not None and figures.sets_equal == 1.0 and figures.error <= 1e-5
    wanted, first = ours(load(tmp_path / "in"), 8)
    found, logprob = greedy(tmp_path / "m.gguf", PROMPT, 8)
    assert found == wanted and logprob == pytest.approx(first, abs=1e-3)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", SOFTMAX | {"shared_experts": 1}, "weighs its experts by softmax, as Mixtral"),
        ("qwen2", SOFTMAX, "weighs its experts by softmax, as Mixtral does, which has no"),
        ("llama", {"mode": "weighted"}, r"weighs experts by sigmoid\(Wx \+ b\), where a stock"),
    ],
)
def test_weights_that_no_folder_can_say_are_refused(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder(tmp_path / "in", family, **changes)
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "in", tmp_path / "out", to="moe")
