"""The loop of a train step: what takes part in a pass, what is read, and where it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_tools.data import Batch
from moe_tools.experts.conversion import Conversion, attach_experts, set_mode
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.ffn import find_ffns
from moe_tools.recipe import Train
from moe_tools.steps.launch import Launch
from moe_tools.training.losses import Observed, efficiency, separability
from moe_tools.training.train import only_trainable, trainable_parts
from moe_tools.training.trainer import RecipeTrainer
from tests.families import EXPERT_SIZE, FAMILIES, THRESHOLD, build, randomize, routed
from tests.hosts.test_moe_host import ROUTERS
from tests.training.test_train import DENSE, HARD, SOFT, text

CAUSAL = [
    name
    for name, family in FAMILIES.items()
    if family.model.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
]
TOP_K = {"kind": "topk", "k": 2}


def trainer(
    model: PreTrainedModel, step: Train, work: Path, blocks: int = 4, **options: Any
) -> RecipeTrainer:
    """As `train` makes it, before its first step."""
    batches = [Batch(ids_BT) for ids_BT in text(blocks).split(step.batch_size)]
    groups = trainable_parts(model, step)
    launch = options.pop("launch", Launch())
    made = RecipeTrainer(
        model, step, batches, work, 1, groups, options.pop("donor", None), 0, launch
    )
    made.enter_step(1, 1)
    return made


def many_experts() -> PreTrainedModel:
    """16 experts of the host with routers of ours inside; a short text leaves some idle."""
    model = build("mixtral", num_local_experts=16)
    find_ffns(model)
    model, _ = routed(model, THRESHOLD)
    randomize(model)
    return model


# --- what takes part


def without_gradient(model: PreTrainedModel, step: Train, work: Path) -> set[str]:
    """Parameters that are trained, but have no gradient after one pass."""
    groups = trainable_parts(model, step)
    with only_trainable(model, groups):
        made = trainer(model.train(), step, work)
        made.compute_loss(model, {"input_ids": text(1)}).backward()
        return {
            name
            for name, param in model.named_parameters()
            if param.requires_grad and param.grad is None
        }


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("losses", [{"lm": 1.0}, {"lm": 1.0, "l1": 0.1}], ids=["lm", "l1"])
def test_every_weight_of_a_host_takes_part(
    family: str, losses: dict[str, Any], tmp_path: Path
) -> None:
    """DistributedDataParallel waits for a gradient of each."""
    model = build(family)
    if "l1" in losses:
        find_ffns(model)  # takes experts apart
    assert not without_gradient(model, replace(DENSE, losses=losses), tmp_path)


@pytest.mark.parametrize("mode", ["soft", "straight", "hard"])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_weight_of_a_routed_model_takes_part(router: str, mode: Any, tmp_path: Path) -> None:
    model = build("mixtral", num_local_experts=16)
    attach_experts(model, Conversion("donor", EXPERT_SIZE, router, TOP_K))
    set_mode(model, mode)
    step = replace(HARD if mode == "hard" else SOFT, mode=mode)
    assert not without_gradient(model, step, tmp_path)


def test_an_expert_without_a_token_has_no_say_in_the_losses(tmp_path: Path) -> None:
    """The mean of no score is no number."""
    model = many_experts()
    set_mode(model, "soft")
    block_BT = text(1)
    with record_routing(model) as routings, torch.no_grad():
        model(input_ids=block_BT)
    assert len(routings) < len(expert_ffns(model))  # without gradients an idle expert is not run
    losses = {"lm": 0.0, "efficiency": 1.0, "separability": 1.0, "l1": 0.0}
    made = trainer(model, replace(SOFT, losses=losses), tmp_path)
    total = made.compute_loss(model, {"input_ids": block_BT})
    seen = Observed(routings)
    assert total.item() == pytest.approx(float(efficiency(seen) + separability(seen)), rel=1e-5)
