"""The loop of a train step: what takes part in a pass, what is read, and where it runs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    masking_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_tools.data import Batch
from moe_tools.experts.conversion import Conversion, attach_experts, set_mode
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routing import record_routing, routing_sparsity
from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.hosts.zeros import zero_share
from moe_tools.names import IGNORE
from moe_tools.recipe import Train
from moe_tools.steps.launch import Launch
from moe_tools.training import arguments
from moe_tools.training import trainer as trainer_module
from moe_tools.training.figures import Figures
from moe_tools.training.losses import LOSSES, Observed, efficiency, separability
from moe_tools.training.optimizer import MasterAdamW
from moe_tools.training.parts import only_trainable, trainable_parts
from moe_tools.training.teacher import Teaching
from moe_tools.training.train import train
from moe_tools.training.trainer import RecipeTrainer
from moe_tools.training.watch import watch_ffns
from tests.families import (
    EXPERT_SIZE,
    FAMILIES,
    THRESHOLD,
    UNEVEN,
    build,
    of_size,
    randomize,
    routed,
)
from tests.hosts.test_moe_host import ROUTERS
from tests.killed import Killed, kill_at
from tests.training.test_train import (
    DENSE,
    HARD,
    SOFT,
    changed,
    converted,
    language_loss,
    state,
    text,
)

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
        model, step, batches, work, 1, groups, Teaching(options.pop("donor", None)), 0, launch
    )
    made.enter_step(1, 1)
    return made


def many_experts() -> PreTrainedModel:
    """16 experts of the host with routers of ours inside; a short text leaves some idle."""
    model = build("mixtral", num_local_experts=16)
    unfused_ffns(model)
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
        unfused_ffns(model)  # takes experts apart
    assert not without_gradient(model, replace(DENSE, losses=losses), tmp_path)


@pytest.mark.parametrize("mode", ["soft", "straight", "weighted", "hard"])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_weight_of_a_routed_model_takes_part(router: str, mode: Any, tmp_path: Path) -> None:
    if mode == "weighted" and router == "similarity":
        return  # it is refused
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


# --- what the host reads of the device


def on_no_device(made: RecipeTrainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The trainer's models without numbers, so that to read one is an error.

    Figures alone can be read; returns a list that grows by the passes of each read.
    """
    made.model.to("meta")
    if made.donor is not None:
        made.donor.to("meta")
    reads: list[int] = []

    # Where there is no device, there is no autocast that could be off.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    # transformers reads itself, once a forward pass, whether positions begin again in a row.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)

    def means(figures: Figures) -> dict[str, float]:
        reads.append(figures.passes)
        assert all(value.is_meta and value.ndim == 0 for value in figures.sums.values())
        return dict.fromkeys(figures.sums, 1.0)

    monkeypatch.setattr(Figures, "means", means)
    return reads


def passes(made: RecipeTrainer, inputs: dict[str, Tensor], count: int = 3) -> None:
    """Those of one optimizer step."""
    for index in range(count):
        made.accelerator.gradient_state._set_sync_gradients(index == count - 1)
        made.compute_loss(made.model, inputs).backward()


ALL_LOSSES: dict[str, Any] = {
    "lm": 1.0,
    "distill": 1.0,
    "distill_ffn": 1.0,
    "efficiency": 0.1,
    "separability": 0.1,
    "load_balance": 0.1,
    "l1": 0.1,
    "hoyer": 0.1,
    "clamped": 0.1,
}
READ_STEPS = {
    "soft": replace(SOFT, losses=ALL_LOSSES, target_sparsity=0.5),
    "straight": replace(SOFT, mode="straight", losses=ALL_LOSSES, target_sparsity=0.5),
    "weighted": replace(SOFT, mode="weighted", losses=ALL_LOSSES, target_sparsity=0.5),
    "eta": replace(SOFT, target_sparsity=0.5, drive="eta"),
    "hard": replace(HARD, losses={"lm": 1.0, "distill": 1.0}, target_sparsity=0.5),
    "dense": replace(
        DENSE,
        losses={name: ALL_LOSSES[name] for name in ALL_LOSSES if not LOSSES[name].needs_routers},
    ),
}


@pytest.mark.parametrize("step", READ_STEPS.values(), ids=[*READ_STEPS])
def test_no_pass_waits_for_the_device_and_an_optimizer_step_does_once(
    step: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama") if step.mode == "dense" else converted()
    if step.mode != "dense":
        set_mode(model, step.mode)
    made = trainer(model, step, tmp_path, donor=build("llama"))
    reads = on_no_device(made, monkeypatch)
    passes(made, {"input_ids": text(4).to("meta")})
    assert reads == [3]
    made.state.max_steps = 1
    monkeypatch.setattr(made.following, "follow", lambda *_: {})
    made.end_step()
    assert reads == [3]
    assert set(made.last) >= set(step.losses)
    assert ("sparsity" in made.last) == (step.mode != "dense")
    assert ("zeros" in made.last) == ("l1" in step.losses)


def test_a_classifier_does_not_wait_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = FAMILIES["bert"].sizes | {"num_labels": 3}
    made = trainer(BertForSequenceClassification(BertConfig(**sizes)), DENSE, tmp_path)
    reads = on_no_device(made, monkeypatch)
    inputs = {"input_ids": text(4), "labels_B": torch.tensor([0, 1, 1, 0])}
    passes(made, {name: tensor.to("meta") for name, tensor in inputs.items()})
    assert reads == [3]


def test_the_labels_of_a_step_are_not_counted(tmp_path: Path) -> None:
    """transformers would divide the loss by their number, after the processes told each other."""
    sizes = FAMILIES["bert"].sizes | {"num_labels": 3}
    made = trainer(BertForSequenceClassification(BertConfig(**sizes)), DENSE, tmp_path)
    batch = {"input_ids": text(4), "labels_B": torch.tensor([0, 1, 1, 0])}
    _, number = made.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert number is None


def test_a_layer_of_the_host_s_experts_waits_for_their_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all 16: not to wait, each would have to run on every token."""
    model = many_experts()
    set_mode(model, "soft")
    made = trainer(model, SOFT, tmp_path)
    on_no_device(made, monkeypatch)
    waits = []

    def in_order(_: HostExperts, chosen_TK: Tensor) -> tuple[Tensor, ...]:
        waits.append(chosen_TK)
        return torch.arange(chosen_TK.numel(), device="meta").tensor_split(16)

    monkeypatch.setattr(HostExperts, "_rows_of_experts", in_order)
    passes(made, {"input_ids": text(1).to("meta")}, count=1)
    assert len(waits) == 2  # layers


def test_the_figures_are_what_the_host_would_count(tmp_path: Path) -> None:
    """Experts of two sizes; fp64 means over passes of different batches."""
    model, _ = routed(build("llama", hidden_act="relu"), of_size(UNEVEN))
    randomize(model)
    set_mode(model, "soft")
    made = trainer(model, replace(SOFT, losses={"lm": 1.0, "l1": 0.1}), tmp_path)
    found: dict[str, list[float]] = {"sparsity": [], "zeros": [], "lm": []}
    for index, block_BT in enumerate(text(6).split(2)):
        with record_routing(model) as routings, watch_ffns(model, {"hidden"}) as ffns:
            found["lm"].append(language_loss(model, block_BT).item())
        found["sparsity"].append(routing_sparsity(routings))
        found["zeros"].append(zero_share(ffns.hidden))
        made.accelerator.gradient_state._set_sync_gradients(index == 2)
        made.compute_loss(model, {"input_ids": block_BT})
    made.end_step()
    assert made.last["sparsity"] == sum(found["sparsity"]) / 3
    assert made.last["zeros"] == sum(found["zeros"]) / 3
    assert made.last["lm"] == pytest.approx(sum(found["lm"]) / 3, rel=1e-6)
    assert 0.2 < made.last["sparsity"] < 0.8 and made.last["zeros"] > 0.2


# --- a loss that is not finite


@pytest.mark.parametrize("spoilt", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(
    spoilt: int, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever pass of the second optimizer step it comes."""
    model = converted()
    step = replace(SOFT, batch_size=1, accumulate=3)
    compute = trainer_module.logit_losses
    at = iter(range(6))
    seen: list[dict[str, Tensor]] = []

    def spoil(*args: Any, **kwargs: Any) -> Any:
        total, parts = compute(*args, **kwargs)
        if (index := next(at)) == 3:
            seen.append(state(model))
        return (total * value if index == 3 + spoilt else total), parts

    monkeypatch.setattr(trainer_module, "logit_losses", spoil)
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at optimizer step 1: lower "):
        train(model, step, text(6), tmp_path)
    assert not changed(model, seen[0])


def test_a_batch_without_a_label_is_refused_before_the_first_pass(tmp_path: Path) -> None:
    model = BertForSequenceClassification(BertConfig(**FAMILIES["bert"].sizes))
    before = state(model)
    labels = [torch.tensor([0, 1]), torch.tensor([IGNORE, IGNORE])]
    batches = [Batch(text(2), labels_B) for labels_B in labels]
    with pytest.raises(ValueError, match="batch 1 has no labelled token"):
        train(model, DENSE, batches, tmp_path)
    with pytest.raises(ValueError, match="batch 0 has no labelled token: its blocks have 1 token"):
        train(build("llama"), DENSE, text(4)[:, :1], tmp_path)
    assert not changed(model, before)


# --- gradients of several passes


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("largest", [1e9, 1e-2])
def test_bf16_gradients_are_summed_and_clipped_in_fp32(
    accumulate: int, largest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step sees is the fp32 sum of what the passes gave, at most of the norm asked for."""
    model = converted(torch.bfloat16)
    sums: dict[int, Tensor] = {}

    def add(grad: Tensor, key: int) -> None:
        sums[key] = sums.get(key, torch.zeros(())) + grad.float()

    for param in model.parameters():
        param.register_hook(partial(add, key=id(param)))
    taken: list[list[Tensor]] = []
    step_of = torch.optim.AdamW.step

    def step(optimizer: MasterAdamW, closure: Any = None) -> Any:
        taken.append([one.grad.clone() for one in optimizer.masters()])
        assert all(weight.grad is None for weight in model.parameters() if not is_fp32(weight))
        return step_of(optimizer, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(arguments, "CLIPPING", largest)
    spec = replace(SOFT, batch_size=1, accumulate=accumulate)
    groups = trainable_parts(model, spec)
    train(model, spec, text(accumulate), tmp_path)
    ((*found,),) = taken
    expected = [sums[id(param)] for group in groups for param in group["params"]]
    assert all(grad.dtype == torch.float32 for grad in found)
    norm = torch.cat([grad.flatten() for grad in expected]).norm()
    scale = min(1.0, largest / (norm.item() + 1e-6))
    for mine, theirs in zip(found, expected, strict=True):
        if scale == 1:
            assert torch.equal(mine, theirs)
        else:
            assert torch.allclose(mine, theirs * scale, rtol=1e-6, atol=0)


def is_fp32(weight: Tensor) -> bool:
    return weight.dtype == torch.float32


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trained_weight_keeps_its_gradients_afterwards(accumulate: int, tmp_path: Path) -> None:
    """Also after a run that was killed: nothing of the optimizer stays on the model."""
    model = converted(torch.bfloat16)
    step = replace(SOFT, batch_size=1, accumulate=accumulate)
    train(model, step, text(2), tmp_path / "one")
    kill_at(model, 2 * accumulate)
    with pytest.raises(Killed):
        train(model, step, text(4), tmp_path / "two")
    language_loss(model, text(1)).backward()
    assert all(param.grad is not None for param in model.model.layers.parameters())


def test_a_killed_run_of_bf16_sums_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    step = replace(SOFT, batch_size=1, accumulate=3, checkpoint_every=2, target_sparsity=0.4)
    through, killed, resumed = (converted(torch.bfloat16) for _ in range(3))
    train(through, step, text(15), tmp_path / "through")
    kill_at(killed, 11)
    with pytest.raises(Killed):
        train(killed, step, text(15), tmp_path / "work")
    train(resumed, step, text(15), tmp_path / "work")
    assert not changed(resumed, state(through))
