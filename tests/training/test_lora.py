"""Adapters in a train step: what they train, and that nothing of them is left."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.recipe import Lora, Train, parse_recipe
from moe_tools.training import arguments
from moe_tools.training import train as train_module
from moe_tools.training.checkpoints import newest_checkpoint
from moe_tools.training.optimizer import MasterAdamW
from moe_tools.training.parts import trainable_parts
from moe_tools.training.train import train
from tests.families import build, is_router, logits
from tests.killed import Killed, kill_at
from tests.training.test_train import DENSE, SOFT, changed, converted, equal, state, text

LORA = replace(SOFT, lora=Lora(rank=2), lr=1e-2)


def linears(model: PreTrainedModel, inside: str = "") -> set[str]:
    """Weights of the linears, without head and routers."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head" and inside in name
    }


@pytest.mark.parametrize(("parts", "inside"), [("all", ""), ("ffn", ".mlp.")])
def test_linears_and_routers_change_and_nothing_else_does(
    parts: Any, inside: str, tmp_path: Path
) -> None:
    model = converted()
    before = state(model)
    train(model, replace(LORA, parts=parts), text(16), tmp_path)
    routers = {name for name in before if is_router(name)}
    assert changed(model, before) == linears(model, inside) | routers
    assert set(state(model)) == set(before)  # no adapter is left
    assert all(param.requires_grad for param in model.parameters())
    assert not any("lora" in type(module).__module__ for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_change_has_the_rank_of_the_adapter(family: str, tmp_path: Path) -> None:
    """GPT-2's linears are stored the other way round."""
    model = build(family)
    before = state(model)
    train(model, replace(DENSE, lora=Lora(rank=2), lr=1e-2), text(16), tmp_path)
    assert changed(model, before) == linears(model)
    for name in linears(model):
        change = (model.state_dict()[name] - before[name]).double()
        values = torch.linalg.svdvals(change)
        assert values[1] > 1e-6 and values[2] < 1e-3 * values[0], name


def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    step = replace(LORA, checkpoint_every=2, target_sparsity=0.4)
    through, killed = converted(), converted()
    before = state(killed)
    train(through, step, text(32), tmp_path / "through")
    kill_at(killed, 6)
    with pytest.raises(Killed):
        train(killed, step, text(32), tmp_path / "work")
    assert set(state(killed)) == set(before)  # the adapters are dropped
    resumed = converted()
    assert newest_checkpoint(tmp_path / "work") is not None
    train(resumed, step, text(32), tmp_path / "work")
    assert equal(resumed, through)


def test_an_adapter_of_rate_zero_changes_nothing(tmp_path: Path) -> None:
    model = build("llama")
    plain = copy.deepcopy(model)
    train(model, replace(DENSE, lora=Lora(), lr=0.0), text(8), tmp_path)
    assert (logits(model) - logits(plain)).abs().max() < 1e-6


@pytest.mark.parametrize("accumulate", [1, 8])
def test_gradients_of_adapters_are_summed_in_fp32(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of bf16 weights, too: what an optimizer step sees is the fp32 sum of what its passes gave."""
    sums: dict[int, Tensor] = {}
    trained: list[nn.Parameter] = []

    def add(grad: Tensor, key: int) -> None:
        sums[key] = sums.get(key, torch.zeros(())) + grad.float()

    def listened(model: PreTrainedModel, step: Train) -> list[dict[str, Any]]:
        groups = trainable_parts(model, step)
        for param in (param for group in groups for param in group["params"]):
            trained.append(param.requires_grad_())
            param.register_hook(partial(add, key=id(param)))
        return groups

    seen: list[list[Tensor]] = []
    step_of = torch.optim.AdamW.step

    def step(optimizer: MasterAdamW, closure: Any = None) -> Any:
        seen.append([one.grad.clone() for one in optimizer.masters()])
        return step_of(optimizer, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(train_module, "trainable_parts", listened)
    monkeypatch.setattr(arguments, "CLIPPING", 1e9)
    spec = replace(LORA, batch_size=1, accumulate=accumulate)
    train(converted(torch.bfloat16), spec, text(accumulate), tmp_path)
    (found,) = seen
    assert len(found) == len(trained) > 4
    assert all(grad.dtype == torch.float32 for grad in found)
    for grad, param in zip(found, trained, strict=True):
        assert torch.allclose(grad, sums[id(param)], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"rank": 0}}, "lora.rank is 0, but must be at least 1"),
        ({"lora": {"alpha": 0}}, "lora.alpha is 0, but must be at least 1"),
        ({"lora": {"rnak": 4}}, "unknown key 'rnak'; did you mean 'rank'?"),
        (
            {"lora": {}, "parts": "routers", "mode": "soft"},
            "lora with parts is routers, but must be all, layers or ffn",
        ),
    ],
)
def test_what_an_adapter_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe({"name": "x", "steps": [{"train": {"tokens": 1, **options}}]})
