"""torch.compile of a train step: what it computes is what is computed without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from moe_tools.recipe import Lora, Stage, Train
from moe_tools.steps.launch import Launch, check_launch
from moe_tools.training.train import train
from tests.families import build
from tests.training.test_train import (
    DENSE,
    HARD,
    SOFT,
    WEIGHTED,
    changed,
    converted,
    equal,
    sparse_donor,
    state,
    text,
)
from tests.training.test_trainer import many_experts

FIGURES = ("lm", "sparsity", "efficiency", "separability", "l1", "clamped", "distill_ffn", "zeros")
LATE = (Stage(0.5, 0.0), Stage(1.0, 1e-1, "constant"))
STEPS: dict[str, Train] = {
    "dense": DENSE,
    "dense, watched": replace(DENSE, losses={"lm": 1.0, "l1": LATE, "clamped": 1e-3}),
    "dense, distilled": replace(DENSE, losses={"lm": 1.0, "distill": 1.0, "distill_ffn": 1.0}),
    "straight": replace(SOFT, mode="straight", target_sparsity=0.4),
    "soft": replace(SOFT, target_sparsity=0.4),
    "soft, adapters": replace(SOFT, lora=Lora(rank=2)),
    "weighted": WEIGHTED,
    "hard": replace(HARD, target_sparsity=0.4),
}


def start(step: Train) -> PreTrainedModel:
    return sparse_donor() if step.mode == "dense" else converted()


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_step_ends_where_an_eager_one_does(name: str, tmp_path: Path) -> None:
    step = STEPS[name]
    eager, model = start(step), start(step)
    given: dict[str, Any] = {"donor": build("llama")} if "distilled" in name else {}
    expected = train(eager, step, text(40), tmp_path / "eager", **given)
    torch._dynamo.reset()
    counters.clear()
    launch = Launch(compile=True)
    measured = train(model, step, text(40), tmp_path / "compiled", launch=launch, **given)
    assert counters["stats"]["unique_graphs"] == 1  # one for all ten steps, hooks included
    assert not counters["graph_break"]
    for key in set(FIGURES) & set(expected):
        assert measured[key] == pytest.approx(expected[key], abs=1e-5, rel=1e-5), key
    for key, value in state(model).items():
        assert (value - eager.state_dict()[key]).abs().max() < 1e-5, key
    assert model._compiled_call_impl is None


def test_experts_of_a_host_are_refused(tmp_path: Path) -> None:
    """How many tokens each of them has is not known before: there would be a graph for each."""
    model = many_experts()
    before = state(model)
    with pytest.raises(ValueError, match=r"--compile .* model.layers.0.mlp.experts"):
        train(model, SOFT, text(4), tmp_path, launch=Launch(compile=True))
    assert not changed(model, before)


@pytest.mark.slow
def test_recomputed_layers_are_compiled_in_parts(tmp_path: Path) -> None:
    step = replace(SOFT, checkpointing=True)
    eager, model = converted(), converted()
    train(eager, step, text(24), tmp_path / "eager")
    train(model, step, text(24), tmp_path / "compiled", launch=Launch(compile=True))
    for key, value in state(model).items():
        assert (value - eager.state_dict()[key]).abs().max() < 1e-5, key


@pytest.mark.slow
def test_an_evaluation_between_the_steps_is_not_compiled(tmp_path: Path) -> None:
    one, other = converted(), converted()
    launch = Launch(compile=True)
    train(one, SOFT, text(24), tmp_path / "one", launch=launch)
    torch._dynamo.reset()
    counters.clear()
    step = replace(SOFT, evaluate_every=2)
    train(other, step, text(24), tmp_path / "other", launch=launch, held_out=text(4))
    assert counters["stats"]["unique_graphs"] == 1
    assert equal(one, other)


def test_it_does_not_go_with_zero_3() -> None:
    launch = Launch(compile=True, deepspeed={"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match="--compile does not go with ZeRO-3"):
        check_launch(launch)


def test_a_machine_that_cannot_compile_is_told_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compilers = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with torch._inductor.config.patch(compilers), pytest.raises(ValueError) as said:
        check_launch(Launch(compile=True))
    assert str(said.value).startswith("--compile: torch.compile does not work here: ")
    assert "\n" not in str(said.value)
    torch._dynamo.reset()
