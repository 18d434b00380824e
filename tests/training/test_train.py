"""The train step on a tiny llama: what it changes, what it reaches, how it stops and resumes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.conversion import (
    Conversion,
    attach_experts,
    read_block,
    read_conversion,
    set_mode,
    write_conversion,
)
from moe_tools.experts.experts import Routing, expert_ffns
from moe_tools.experts.routing import observe_routing, record_routing
from moe_tools.hosts.ffn import find_ffns, host_state_dict
from moe_tools.hosts.input_threshold import thresholds_in
from moe_tools.recipe import Attach, Budget, Stage, Swap, Train
from moe_tools.steps.attach import attach
from moe_tools.steps.budget import budget
from moe_tools.steps.swap import swap
from moe_tools.thresholds.calibration import Plan, calibrate_thresholds
from moe_tools.thresholds.rows import write_rows
from moe_tools.training.checkpoints import newest_checkpoint
from moe_tools.training.controller import Reference
from moe_tools.training.losses import Observed, efficiency, separability
from moe_tools.training.parts import trainable_parts
from moe_tools.training.train import train
from tests.families import (
    EXPERT_SIZE,
    EXPERTS,
    SPLIT,
    build,
    is_router,
    logits,
    randomize,
    routed,
    sparsity,
)
from tests.killed import Killed, kill_at

LENGTH = 16
LTE = {"lm": 1.0, "efficiency": 0.1, "separability": 0.1}
SOFT = Train(tokens=1, mode="soft", losses=LTE, batch_size=4, lr=1e-3)
WEIGHTED = replace(SOFT, mode="weighted")
HARD = Train(tokens=1, mode="hard", batch_size=4, lr=1e-3)
DENSE = Train(tokens=1, batch_size=4, lr=1e-3)
TOPK = Conversion("donor", EXPERT_SIZE, "sigmoid", {"kind": "topk", "k": 2})


def text(rows: int) -> Tensor:
    """The first rows of a language in which the next token is one of four."""
    draw = torch.Generator().manual_seed(5)
    columns = [torch.randint(3, 64, (2000,), generator=draw)]
    for _ in range(LENGTH - 1):
        step = torch.randint(4, (2000,), generator=draw)
        columns.append((7 * columns[-1] + step) % 61 + 3)
    return torch.stack(columns, 1)[:rows]


def converted(dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """A routed model, as `attach` leaves it; the same on every call."""
    torch.manual_seed(0)
    model = build("llama", **config).to(dtype)
    step = Attach(start_sparsity=0.1)
    attach(model, step, SPLIT, text(32))
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, now in model.state_dict().items() if not torch.equal(now, before[name])}


def equal(one: nn.Module, other: nn.Module) -> bool:
    return not changed(one, state(other))


def language_loss(model: PreTrainedModel, blocks_BT: Tensor) -> Tensor:
    scores = model(input_ids=blocks_BT).logits[:, :-1]
    return nn.functional.cross_entropy(scores.flatten(0, 1), blocks_BT[:, 1:].flatten())


# --- what is trained


def parts_of(model: PreTrainedModel, kind: str) -> set[str]:
    ffns = {name for name in model.state_dict() if ".mlp." in name and not is_router(name)}
    routers = {name for name in model.state_dict() if is_router(name)}
    host = set(model.state_dict()) - routers
    ends = {name for name in host if "embed_tokens" in name or "lm_head" in name}
    return {"host": host, "layers": host - ends, "ffn": ffns, "routers": routers}[kind]


@pytest.mark.parametrize(
    ("mode", "parts", "expected"),
    [
        ("dense", "all", ["host"]),
        ("dense", "layers", ["layers"]),
        ("dense", "ffn", ["ffn"]),
        ("soft", "all", ["host", "routers"]),
        ("soft", "ffn", ["ffn", "routers"]),
        ("soft", "routers", ["routers"]),
        ("straight", "all", ["host", "routers"]),
        ("straight", "layers", ["layers", "routers"]),
        ("straight", "ffn", ["ffn", "routers"]),
        ("straight", "routers", ["routers"]),
        ("weighted", "all", ["host", "routers"]),
        ("weighted", "ffn", ["ffn", "routers"]),
        ("weighted", "routers", ["routers"]),
        ("hard", "all", ["host"]),
        ("hard", "ffn", ["ffn"]),
    ],
)
def test_exactly_the_named_parts_change(
    mode: Any, parts: Any, expected: list[str], tmp_path: Path
) -> None:
    model = build("llama") if mode == "dense" else converted()
    before = state(model)
    step = replace(DENSE, mode=mode, parts=parts)
    train(model, step, text(16), tmp_path)
    assert changed(model, before) == set().union(*(parts_of(model, kind) for kind in expected))


def test_each_part_has_its_rate() -> None:
    model = converted()
    host, routers = trainable_parts(model, replace(SOFT, lr=1e-4, router_lr=1e-2))
    assert (host["lr"], routers["lr"]) == (1e-4, 1e-2)
    assert {p.shape for p in routers["params"]} == {(6, 16), (6,)}
    assert len(host["params"]) + len(routers["params"]) == len(list(model.parameters()))
    (only,) = trainable_parts(model, HARD)
    assert only["lr"] == 1e-3
    assert not {id(p) for p in only["params"]} & {id(p) for p in routers["params"]}


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "mixtral"])
def test_the_ffns_of_other_hosts_are_found_too(family: str, tmp_path: Path) -> None:
    model = build(family)
    dense = {id(p) for p in trainable_parts(model, replace(DENSE, parts="ffn"))[0]["params"]}
    downs = {id(p) for ffn in find_ffns(model) for p in ffn.down.parameters()}
    assert downs < dense < {id(p) for p in model.parameters()}
    model, ffns = routed(model)
    hard = trainable_parts(model, replace(HARD, parts="ffn"))[0]["params"]
    assert len(hard) == len(dense)
    train(model, replace(SOFT, parts="ffn"), text(8), tmp_path)
    assert ffns


@pytest.mark.parametrize("trainable", [True, False])
def test_every_flag_is_put_back(trainable: bool, tmp_path: Path) -> None:
    model = converted()
    flags = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        flags[name] = trainable or index % 2 == 0
        parameter.requires_grad_(flags[name])
    train(model, SOFT, text(8), tmp_path / "one")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    kill_at(model, 2)  # its first step is done
    with pytest.raises(Killed):
        train(model, HARD, text(8), tmp_path / "two")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("step", [DENSE, SOFT, replace(SOFT, mode="straight"), WEIGHTED, HARD])
def test_training_learns(step: Train, tmp_path: Path) -> None:
    model = build("llama") if step.mode == "dense" else converted()
    before = language_loss(model, text(16)).item()
    measured = train(model, replace(step, lr=5e-3), text(120), tmp_path)
    after = language_loss(model, text(16)).item()
    assert after < before - 0.1
    assert measured["steps"] == 30
    assert measured["lm"] < before


# --- the modes


@pytest.mark.parametrize("mode", ["soft", "straight", "weighted", "hard"])
def test_the_first_loss_is_the_one_of_the_mode(mode: Any, tmp_path: Path) -> None:
    model = converted()
    set_mode(model, mode)
    expected = language_loss(model, text(4)).item()
    off = sparsity(model, text(4))
    measured = train(model, replace(SOFT, mode=mode, losses={"lm": 1.0}), text(4), tmp_path)
    assert measured["lm"] == pytest.approx(expected, abs=1e-5)
    assert measured["sparsity"] == pytest.approx(off)


@pytest.mark.parametrize("mode", ["soft", "straight", "hard"])
def test_a_trained_model_is_hard_and_in_eval_mode(mode: Any, tmp_path: Path) -> None:
    model = converted()
    train(model, replace(SOFT, mode=mode), text(8), tmp_path)
    conversion = read_conversion(model)
    assert conversion is not None and conversion.mode == "hard"
    assert {ffn.mode for ffn in expert_ffns(model)} == {"hard"}
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_learned_its_weights_keeps_them(tmp_path: Path) -> None:
    model = converted()
    train(model, WEIGHTED, text(8), tmp_path)
    conversion = read_conversion(model)
    assert conversion is not None and conversion.mode == "weighted"
    assert {ffn.mode for ffn in expert_ffns(model)} == {"weighted"}


def by_hand(ffn: Any, x_TD: Tensor) -> Tensor:
    """y = sum over experts of G_e E_e(x), an expert at a time."""
    scores_TE = torch.sigmoid(x_TD @ ffn.router.weight.T + ffn.router.bias)
    y_TD = ffn.down_proj.bias.expand(len(x_TD), -1)
    for expert in range(EXPERTS):
        rows = slice(expert * EXPERT_SIZE, (expert + 1) * EXPERT_SIZE)
        gate = nn.functional.silu(x_TD @ ffn.gate_proj.weight[rows].T + ffn.gate_proj.bias[rows])
        up = x_TD @ ffn.up_proj.weight[rows].T + ffn.up_proj.bias[rows]
        out_TD = (gate * up) @ ffn.down_proj.weight[:, rows].T
        y_TD = y_TD + scores_TE[:, expert, None] * out_TD
    return y_TD


@pytest.mark.parametrize("mode", ["soft", "straight"])
def test_the_router_s_gradient_is_that_of_the_formula(mode: Any) -> None:
    """Straight: the same formula gives the gradient of the routers; only the forward is hard."""
    model = converted()
    set_mode(model, mode)
    ffn = expert_ffns(model)[0]
    x_TD, upstream_TD = torch.randn(20, 16), torch.randn(20, 16)
    names = [name for name, _ in ffn.named_parameters() if is_router(f".{name}")]
    wanted = [ffn.get_parameter(name) for name in names]
    mine = torch.autograd.grad(ffn(x_TD), wanted, upstream_TD)
    theirs = torch.autograd.grad(by_hand(ffn, x_TD), wanted, upstream_TD)
    for one, other in zip(mine, theirs, strict=True):
        assert other.abs().max() > 1e-3
        assert (one - other).abs().max() < 1e-5
    if mode == "soft":
        assert (ffn(x_TD) - by_hand(ffn, x_TD)).abs().max() < 1e-5


def test_a_soft_step_follows_the_gradient_of_the_whole_loss(tmp_path: Path) -> None:
    """The first Adam step moves every weight by its rate against the sign of its gradient."""
    model = converted()
    donor = copy.deepcopy(model)
    set_mode(donor, "soft")
    with record_routing(donor) as routings:
        loss = language_loss(donor, text(4))
    seen = Observed(routings)
    (loss + 0.1 * efficiency(seen) + 0.1 * separability(seen)).backward()
    train(model, replace(SOFT, lr=1e-4, router_lr=1e-3), text(4), tmp_path)
    for (name, now), was in zip(model.named_parameters(), donor.parameters(), strict=True):
        assert was.grad is not None
        rate = 1e-3 if is_router(name) else 1e-4
        clear = was.grad.abs() > 1e-4
        assert clear.any()
        moved = (now - was)[clear] / rate
        assert (moved + was.grad[clear].sign()).abs().max() < 0.02


@pytest.mark.parametrize("target", [None, 0.5])
def test_hard_mode_gives_routers_no_gradient(target: float | None, tmp_path: Path) -> None:
    model = converted()
    before = state(model)
    flags: list[bool] = []
    grads: list[Tensor | None] = []

    def note(parameter: nn.Parameter) -> None:
        flags.append(parameter.requires_grad)
        grads.append(parameter.grad)

    for ffn in expert_ffns(model):
        for parameter in ffn.router.parameters():
            ffn.router.register_forward_pre_hook(lambda *_, p=parameter: note(p))
    train(model, replace(HARD, target_sparsity=target), text(80), tmp_path)
    assert flags and not any(flags)
    assert set(grads) == {None}
    moved = {name for name in changed(model, before) if is_router(name)}
    if target is None:
        assert not moved
        return
    assert moved == {name for name in before if name.endswith("router.bias")}
    shifts = torch.cat([model.get_parameter(name) - before[name] for name in sorted(moved)])
    assert (shifts - shifts[0]).abs().max() < 1e-5
    assert shifts[0] < -0.1  # sparser


def test_equal_donors_distil_to_nothing(tmp_path: Path) -> None:
    donor = build("llama")
    model = copy.deepcopy(donor)
    losses = {"distill": 1.0, "distill_ffn": 1.0}
    measured = train(model, replace(DENSE, losses=losses), text(4), tmp_path, donor=donor)
    assert measured["distill"] == pytest.approx(0, abs=1e-6)
    assert measured["distill_ffn"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_that_see_other_tokens_than_the_donor_s_are_distilled(
    family: str, tmp_path: Path
) -> None:
    donor = build(family)
    model = copy.deepcopy(donor)
    swap(model, Swap({"kind": "relu"}), Conversion("donor"), text(1))
    for router in (p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")):
        router.data = router.data.roll(1, 0)  # each token passes other experts
    step = replace(DENSE, losses={"distill_ffn": 1.0}, parts="ffn", lr=1e-2)
    apart = (logits(model) - logits(donor)).abs().mean()
    train(model, step, text(160), tmp_path, donor=donor)
    assert (logits(model) - logits(donor)).abs().mean() < 0.9 * apart


@pytest.mark.parametrize("loss", ["distill", "distill_ffn"])
def test_distillation_brings_a_model_back_to_its_donor(loss: str, tmp_path: Path) -> None:
    donor = build("llama")
    flags = [p.requires_grad for p in donor.parameters()]
    frozen = state(donor)
    model = copy.deepcopy(donor)
    with torch.no_grad():
        for ffn in find_ffns(model):
            ffn.down.weight.mul_(0.5)
    apart = (logits(model) - logits(donor)).abs().mean()
    step = replace(DENSE, losses={loss: 1.0}, parts="ffn", lr=1e-2)
    measured = train(model, step, text(160), tmp_path, donor=donor)
    assert (logits(model) - logits(donor)).abs().mean() < 0.6 * apart
    assert measured["steps"] == 40
    assert not changed(donor, frozen)
    assert [p.requires_grad for p in donor.parameters()] == flags


# --- the target sparsity


@pytest.mark.parametrize("mode", ["soft", "straight", "hard"])
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_shift_reaches_the_target(mode: Any, target: float, tmp_path: Path) -> None:
    step = replace(SOFT, mode=mode, losses={"lm": 1.0}, target_sparsity=target, batch_size=32)
    model = converted()
    measured = train(model, step, text(32 * 40), tmp_path)
    assert measured["reference"] == pytest.approx(target)
    assert measured["sparsity"] == pytest.approx(target, abs=0.02)
    assert sparsity(model, text(32 * 40)) == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize("router", ["cats", "oracle"])
def test_thresholds_of_the_ffn_s_own_rows_are_led_too(router: str, tmp_path: Path) -> None:
    """No router to train: the line moves, and the weights learn to live with it."""
    model = own_rows(router)
    step = replace(HARD, target_sparsity=0.8, batch_size=32)
    measured = train(model, step, text(32 * 40), tmp_path)
    assert measured["sparsity"] == pytest.approx(0.8, abs=0.03)
    assert sparsity(model, text(320)) == pytest.approx(0.8, abs=0.03)
    written = read_block(model.config)
    assert written is not None and len(written.selector_of) == 2


def own_rows(router: str) -> PreTrainedModel:
    """A model whose neurons are chosen by their own rows, half of them on random text."""
    torch.manual_seed(0)
    model = build("llama")
    attach_experts(model, Conversion("donor", 1, router, {"kind": "threshold", "tau": 0.0}))
    budget(model, Budget(target_sparsity=0.5), text(32))
    return model


def test_a_target_that_varies_is_met_in_every_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As close as one batch tells about the next; the last step leaves the target itself."""
    step = replace(SOFT, mode="straight", losses={"lm": 1.0}, batch_size=32, lr=0.0, router_lr=0.0)
    step = replace(step, target_sparsity=0.5, vary=0.3, ramp=0.0)
    model = converted()
    drawn, met = [], []

    def see(routing: Routing) -> None:
        met.append(1 - float(routing.mask_TE.double().mean()))

    reference = Reference(0.0, 0.5, 40, 0.0, 0.3)
    drawn = [reference.after(at) for at in range(1, 40)]
    with observe_routing(model, see):
        measured = train(model, step, text(32 * 40), tmp_path)
    pairs = [sum(met[at : at + 2]) / 2 for at in range(2, 80, 2)]  # two FFNs; after the first step
    assert [*pairs] == pytest.approx(drawn, abs=0.06)
    assert min(drawn) < 0.25 and max(drawn) > 0.75
    assert measured["sparsity"] == pytest.approx(0.5, abs=0.04)
    assert "asked for" not in caplog.text
    assert sparsity(model, text(320)) == pytest.approx(0.5, abs=0.02)


def test_what_inputs_drop_varies_with_it_and_ends_where_it_was(tmp_path: Path) -> None:
    step = replace(SOFT, mode="straight", losses={"lm": 1.0}, target_sparsity=0.5, vary=0.3)
    model = converted()
    drop_inputs(model, 0.4)
    before = {path: one.at for path, one in thresholds_in(model).items()}
    seen: list[float] = []
    first = next(iter(thresholds_in(model).values()))
    first.observers.append(lambda _: seen.append(first.at))
    train(model, step, text(80), tmp_path)
    assert len(set(seen)) > 15 and min(seen) < before[next(iter(before))] < max(seen)
    assert {path: one.at for path, one in thresholds_in(model).items()} == pytest.approx(before)


def test_a_varied_step_is_looked_at_where_it_was_asked_for(tmp_path: Path) -> None:
    """Not where the next step has drawn it: the looks of a curve compare."""
    step = replace(SOFT, mode="straight", losses={"lm": 1.0}, batch_size=32, lr=0.0, router_lr=0.0)
    step = replace(step, target_sparsity=0.5, ramp=0.0, evaluate_every=1)
    looks = [
        [
            one["heldout_lm"]
            for one in train(
                converted(),
                replace(step, vary=vary),
                text(32 * 8),
                tmp_path / f"{vary}",
                held_out=text(96),
            )["history"]
        ]
        for vary in (0.0, 0.4)
    ]
    assert looks[1][2:] == pytest.approx(looks[0][2:], abs=2e-3)


def drop_inputs(model: PreTrainedModel, share: float) -> None:
    """Gives what enters the linears of its FFNs thresholds that drop such a share."""
    rows = calibrate_thresholds(model, Plan(share), text(16)).rows
    conversion = read_conversion(model)
    assert conversion is not None
    write_rows(model, conversion, rows)


def test_a_sparser_model_comes_back(tmp_path: Path) -> None:
    model = converted()
    with torch.no_grad():
        for ffn in expert_ffns(model):
            ffn.router.bias.sub_(3.0)
    assert sparsity(model, text(32)) > 0.5
    step = replace(SOFT, target_sparsity=0.3, batch_size=32)
    train(model, step, text(32 * 40), tmp_path)
    assert sparsity(model, text(320)) == pytest.approx(0.3, abs=0.02)


def test_eta_reaches_the_target(tmp_path: Path) -> None:
    losses = {"lm": 1.0, "separability": 0.05}
    step = replace(SOFT, losses=losses, target_sparsity=0.4, drive="eta", router_lr=3e-3)
    model = converted()
    measured = train(model, step, text(4 * 300), tmp_path)
    assert measured["efficiency_weight"] > 0 and "efficiency" in measured
    assert sparsity(model, text(64)) == pytest.approx(0.4, abs=0.04)


def sparse_donor() -> PreTrainedModel:
    """A dense ReLU model, the same on every call."""
    torch.manual_seed(0)
    return build("llama", hidden_act="relu")


@torch.no_grad()
def zeros(model: PreTrainedModel, blocks_BT: Tensor) -> float:
    """Share of exact zeros among what enters the down projections."""
    seen: list[Tensor] = []
    for ffn in find_ffns(model):
        ffn.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=blocks_BT)
    return torch.cat(seen).eq(0).float().mean().item()


def test_the_zeros_of_a_batch_are_logged(tmp_path: Path) -> None:
    model = sparse_donor()
    expected = zeros(model, text(4))
    measured = train(model, replace(DENSE, losses={"lm": 1.0, "l1": 0.0}), text(4), tmp_path)
    assert 0.2 < expected < 0.8
    assert measured["zeros"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("drive", ["l1", "hoyer"])
@pytest.mark.parametrize("target", [0.7, 0.9])
def test_lambda_reaches_the_target(drive: Any, target: float, tmp_path: Path) -> None:
    step = replace(DENSE, target_sparsity=target, drive=drive, lr=3e-3, batch_size=8)
    model = sparse_donor()
    measured = train(model, step, text(8 * 200), tmp_path)
    assert measured["reference"] == pytest.approx(target)
    assert 1e-9 < measured[f"{drive}_weight"] < 1
    assert zeros(model, text(256)) == pytest.approx(target, abs=0.03)


def test_a_target_that_is_missed_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = replace(DENSE, target_sparsity=0.95, drive="l1")
    train(sparse_donor(), step, text(8), tmp_path / "few")
    assert "at the end, 95.0% asked for; drive l1 needs more steps or a higher" in caplog.text
    caplog.clear()
    steps = replace(SOFT, target_sparsity=0.3, batch_size=32)
    train(converted(), steps, text(32 * 40), tmp_path / "many")
    assert "asked for" not in caplog.text


def test_neurons_of_an_expert_learn_to_fire_together(tmp_path: Path) -> None:
    step = replace(DENSE, losses={"lm": 1.0, "group_hoyer": 1.0}, lr=1e-2)
    with pytest.raises(ValueError, match="no experts: put `split` before"):
        train(build("llama"), step, text(80), tmp_path / "unsplit")
    model = build("llama")
    write_conversion(model, SPLIT)
    history = train(model, step, text(160), tmp_path / "split")["history"]
    assert 1 < history[-1]["group_hoyer"] < 0.9 * history[0]["group_hoyer"]


def test_lambda_starts_where_the_recipe_says(tmp_path: Path) -> None:
    step = replace(DENSE, target_sparsity=0.9, drive="l1", losses={"lm": 1.0, "l1": 2e-3})
    measured = train(sparse_donor(), step, text(4), tmp_path)
    assert measured["l1_weight"] == 2e-3


STAGES = (Stage(0.2, 0.0), Stage(0.6, 2e-2), Stage(1.0, 1e-2))


def test_a_staged_weight_is_that_of_every_step(tmp_path: Path) -> None:
    """Logged every ten steps of fifty: the ends of the stages are among them."""
    step = replace(DENSE, losses={"lm": 1.0, "l1": STAGES})
    history = train(sparse_donor(), step, text(200), tmp_path)["history"]
    weights = [entry["l1_weight"] for entry in history][:5]
    assert weights == pytest.approx([0.0, 1e-2, 2e-2, 1.5e-2, 1e-2])
    assert all("lm_weight" not in entry for entry in history)


def test_a_stage_of_weight_zero_trains_as_without_the_loss(tmp_path: Path) -> None:
    stages = (Stage(0.5, 0.0), Stage(1.0, 1.0, "constant"))
    one, other, third = sparse_donor(), sparse_donor(), sparse_donor()
    train(one, DENSE, text(4), tmp_path / "one")
    train(other, replace(DENSE, losses={"lm": 1.0, "l1": (Stage(1.0, 0.0),)}), text(4), tmp_path)
    assert equal(one, other)
    losses = {"lm": 1.0, "l1": stages}
    measured = train(third, replace(DENSE, losses=losses, warmup=0), text(40), tmp_path / "third")
    without = train(sparse_donor(), replace(DENSE, warmup=0), text(40), tmp_path / "without")
    assert measured["l1_weight"] == 1.0
    assert measured["history"][0]["lm"] != without["history"][0]["lm"]


def test_hard_mode_is_led_to_its_target_as_the_others(tmp_path: Path) -> None:
    step = replace(HARD, target_sparsity=0.6, ramp=1.0)
    first, *_ = train(converted(), step, text(160), tmp_path)["history"]
    assert first["step"] == 10 and first["reference"] < 0.55
    at_once, *_ = train(converted(), replace(step, ramp=0.0), text(160), tmp_path / "2")["history"]
    assert at_once["reference"] == 0.6


def test_the_reference_starts_where_the_model_is(tmp_path: Path) -> None:
    model = converted()
    set_mode(model, "soft")
    off = sparsity(model, text(4))
    step = replace(SOFT, target_sparsity=0.6, ramp=1.0)
    first, *_ = train(model, step, text(80), tmp_path)["history"]
    assert first["step"] == 10
    assert first["reference"] == pytest.approx((off + 0.6) / 2)  # of 20 steps


# --- batches


def test_accumulated_batches_are_one(tmp_path: Path) -> None:
    """Every block has as many labels, so the mean of the means is the mean."""
    step = replace(SOFT, lr=1e-4)
    one, other = converted(), converted()
    assert equal(one, other)
    whole = train(one, replace(step, batch_size=8), text(64), tmp_path / "one")
    parts = train(other, replace(step, batch_size=2, accumulate=4), text(64), tmp_path / "other")
    assert whole["steps"] == parts["steps"] == 8
    for name in ("lm", "efficiency", "separability", "sparsity"):
        assert whole[name] == pytest.approx(parts[name], rel=1e-4)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a - b).abs().mean() < 1e-6, name


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (2, 4), (2, 2)])
def test_fewer_blocks_than_a_step_takes_are_one_step(
    batch_size: int, accumulate: int, tmp_path: Path
) -> None:
    model = converted()
    set_mode(model, "soft")
    expected = language_loss(model, text(3)).item()
    off = sparsity(model, text(3))
    step = replace(
        SOFT, losses={"lm": 1.0}, batch_size=batch_size, accumulate=accumulate, lr=0, router_lr=0
    )
    measured = train(model, step, text(3), tmp_path)
    assert measured["steps"] == 1
    assert measured["lm"] == pytest.approx(expected, rel=0.05)
    assert measured["sparsity"] == pytest.approx(off, abs=0.05)


def test_the_blocks_are_seen_in_order_and_once(tmp_path: Path) -> None:
    model = converted()
    seen: list[Tensor] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    blocks_BT = text(20)
    train(model, replace(SOFT, batch_size=3, accumulate=2), blocks_BT, tmp_path)
    assert torch.equal(torch.cat(seen), blocks_BT[:18])


def test_the_same_run_gives_the_same_weights(tmp_path: Path) -> None:
    one, other = converted(), converted()
    train(one, SOFT, text(24), tmp_path / "one", seed=1)
    train(other, SOFT, text(24), tmp_path / "other", seed=1)
    assert equal(one, other)


def test_fp32_routers_stay_fp32_beside_bf16_weights(tmp_path: Path) -> None:
    model = converted(torch.bfloat16)
    before = state(model)
    train(model, replace(SOFT, target_sparsity=0.3), text(40), tmp_path)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if is_router(name) else torch.bfloat16)
    assert changed(model, before) >= parts_of(model, "routers")
    assert torch.isfinite(logits(model)).all()


# --- stopping and going on


RESUMED = {
    "soft, shift": replace(SOFT, target_sparsity=0.4),
    "soft, eta": replace(SOFT, target_sparsity=0.4, drive="eta"),
    "soft, accumulated": replace(SOFT, target_sparsity=0.4, batch_size=2, accumulate=2),
    "straight": replace(SOFT, mode="straight", target_sparsity=0.4),
    "hard": replace(HARD, target_sparsity=0.4),
    "varied": replace(SOFT, mode="straight", target_sparsity=0.4, vary=0.3),
}


@pytest.mark.parametrize(
    ("step", "dtype"),
    [(step, torch.float32) for step in RESUMED.values()] + [(SOFT, torch.bfloat16)],
    ids=[*RESUMED, "bf16"],
)
def test_a_killed_run_ends_where_an_undisturbed_one_does(
    step: Train, dtype: torch.dtype, tmp_path: Path
) -> None:
    step = replace(step, checkpoint_every=3, lr=1e-2)
    start, blocks_BT = converted(dtype), text(50)  # 12 steps, two blocks over
    through = copy.deepcopy(start)
    expected = train(through, step, blocks_BT, tmp_path / "through")
    for forward_pass in (5, 5):  # in step 5, and after a resume from 3 in step 8
        killed = copy.deepcopy(start)
        kill_at(killed, forward_pass * step.accumulate)
        with pytest.raises(Killed):
            train(killed, step, blocks_BT, tmp_path / "work")
    assert newest_checkpoint(tmp_path / "work") == str(tmp_path / "work" / "checkpoint-6")
    resumed = copy.deepcopy(start)
    measured = train(resumed, step, blocks_BT, tmp_path / "work")
    assert equal(resumed, through)
    assert measured["steps"] == expected["steps"] == 12
    for name in set(expected) - {"history"}:
        assert measured[name] == pytest.approx(expected[name]), name


@pytest.mark.parametrize("vary", [0.0, 0.2])
def test_a_killed_run_goes_on_with_its_thresholds(vary: float, tmp_path: Path) -> None:
    """Those that choose neurons by their own rows, and those that drop inputs."""

    def start() -> PreTrainedModel:
        model = own_rows("cats")
        drop_inputs(model, 0.3)
        return model

    step = replace(HARD, target_sparsity=0.6, vary=vary, checkpoint_every=3, lr=1e-2)
    through, resumed, killed = start(), start(), start()
    train(through, step, text(50), tmp_path / "through")
    kill_at(killed, 5)
    with pytest.raises(Killed):
        train(killed, step, text(50), tmp_path / "work")
    train(resumed, step, text(50), tmp_path / "work")
    assert equal(resumed, through)
    for one, other in zip(expert_ffns(resumed), expert_ffns(through), strict=True):
        assert one.selector == other.selector
    assert [*thresholds_at(resumed)] == [*thresholds_at(through)]


def thresholds_at(model: PreTrainedModel) -> list[float]:
    return [one.at for one in thresholds_in(model).values()]


@pytest.mark.parametrize(
    "step",
    [
        replace(DENSE, losses={"lm": 1.0, "l1": STAGES}),
        replace(DENSE, target_sparsity=0.8, drive="l1"),
    ],
    ids=["stages", "drive l1"],
)
def test_a_killed_dense_run_ends_where_an_undisturbed_one_does(step: Train, tmp_path: Path) -> None:
    step = replace(step, checkpoint_every=3, lr=1e-2)
    through, killed, resumed = sparse_donor(), sparse_donor(), sparse_donor()
    expected = train(through, step, text(40), tmp_path / "through")
    kill_at(killed, 8)
    with pytest.raises(Killed):
        train(killed, step, text(40), tmp_path / "work")
    measured = train(resumed, step, text(40), tmp_path / "work")
    assert equal(resumed, through)
    assert measured["l1_weight"] == pytest.approx(expected["l1_weight"])


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    start = build("gpt2", dropout=0.3)
    step = replace(DENSE, checkpoint_every=3)
    through, killed, resumed = (copy.deepcopy(start) for _ in range(3))
    train(through, step, text(40), tmp_path / "through")
    kill_at(killed, 5)
    with pytest.raises(Killed):
        train(killed, step, text(40), tmp_path / "work")
    train(resumed, step, text(40), tmp_path / "work")
    assert equal(resumed, through)


@pytest.mark.parametrize("rows", [24, 26])
def test_a_run_killed_after_its_last_checkpoint_is_complete(rows: int, tmp_path: Path) -> None:
    """With 26 blocks, the last two do not fill a step: they must not become one now."""
    start, step = converted(), replace(SOFT, target_sparsity=0.4, checkpoint_every=2)
    once, again = copy.deepcopy(start), copy.deepcopy(start)
    expected = train(once, step, text(rows), tmp_path)
    measured = train(again, step, text(rows), tmp_path)
    assert equal(once, again)
    assert measured["steps"] == expected["steps"] == 6
    for name in set(expected) - {"history"}:
        assert measured[name] == pytest.approx(expected[name]), name


def spoil_nothing(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()


def truncate(checkpoint: Path) -> None:
    state_file = checkpoint / "trainer_state.json"
    state_file.write_text(state_file.read_text()[:40])


def empty(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_text("")


def another_kind(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_text("[1]")


@pytest.mark.parametrize("spoil", [spoil_nothing, truncate, empty, another_kind])
def test_a_half_written_checkpoint_is_ignored(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    start, step = converted(), replace(SOFT, target_sparsity=0.4, checkpoint_every=2)
    through, killed, resumed = (copy.deepcopy(start) for _ in range(3))
    train(through, step, text(32), tmp_path / "through")
    kill_at(killed, 6)
    work = tmp_path / "work"
    with pytest.raises(Killed):
        train(killed, step, text(32), work)
    spoil(work / "checkpoint-4")
    (work / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(work) == str(work / "checkpoint-2")
    train(resumed, step, text(32), work)
    assert equal(resumed, through)


def test_the_newest_checkpoint_is_the_one_of_the_most_steps(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    assert newest_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_checkpoints_hold_no_pickled_arguments(tmp_path: Path) -> None:
    train(converted(), replace(SOFT, checkpoint_every=2), text(16), tmp_path)
    names = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert "model.safetensors" in names and "training_args.bin" not in names


# --- what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = converted()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at optimizer step 0: lower the"):
        train(model, SOFT, text(8), tmp_path)
    assert newest_checkpoint(tmp_path) is None


def test_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    model = converted()
    good: list[dict[str, Tensor]] = []
    count = 0

    def poison(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            good.append(state(model))
            with torch.no_grad():
                model.lm_head.weight[5, 5] = torch.nan

    model.model.register_forward_pre_hook(poison)
    with pytest.raises(FloatingPointError, match="is nan at optimizer step 4: "):
        train(model, replace(SOFT, checkpoint_every=2), text(40), tmp_path)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    resumed = converted()
    resumed_step = replace(SOFT, checkpoint_every=2)
    kill_at(resumed, 1)
    with pytest.raises(Killed):
        train(resumed, resumed_step, text(40), tmp_path)
    assert not changed(resumed, good[0])


def test_a_rate_far_too_high_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(converted(), replace(SOFT, lr=1e30), text(40), tmp_path)


@pytest.mark.parametrize("rows", [4, 8])
def test_a_gradient_that_overflows_spoils_no_checkpoint(rows: int, tmp_path: Path) -> None:
    """The loss was finite; after the last step, no further one would show it."""
    model = converted()
    model.lm_head.weight.register_hook(lambda grad: grad * torch.inf)
    step = replace(SOFT, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match="is not finite after optimizer step 1: lower the"):
        train(model, step, text(rows), tmp_path)
    assert newest_checkpoint(tmp_path) is None


NEEDS_ROUTERS = "needs routers: put `attach` before this train step"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (replace(DENSE, losses={"efficiency": 1.0}), f"loss efficiency {NEEDS_ROUTERS}"),
        (replace(DENSE, losses={"separability": 1.0}), f"loss separability {NEEDS_ROUTERS}"),
        (replace(DENSE, losses={"distill": 1.0}), "loss distill needs the donor"),
        (replace(DENSE, losses={"distill_ffn": 1.0}), "loss distill_ffn needs the donor"),
        (replace(DENSE, losses={"eficiency": 1.0}), "unknown loss 'eficiency'; did you mean 'ef"),
        (replace(DENSE, target_sparsity=0.5), "target_sparsity needs routers: put `attach`"),
        (
            replace(DENSE, target_sparsity=0.5, drive="l1"),
            "drive l1 counts exact zeros, but SiLUActivation of model.layers.0.mlp has none: put",
        ),
        (replace(DENSE, drive="l1"), "drive l1 needs a target_sparsity"),
        (replace(DENSE, losses={"l1": (Stage(0.0, 1.0),)}), "but must be rising numbers"),
        (replace(DENSE, parts="routers"), "mode dense gives routers no gradient"),
        (replace(SOFT, losses={"lm": 1.0}), "train mode soft does not fit a dense model"),
        (HARD, "train mode hard does not fit a dense model"),
    ],
)
def test_what_a_dense_model_cannot_have(step: Train, message: str, tmp_path: Path) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        train(model, step, text(8), tmp_path / "work")
    assert not changed(model, before)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (DENSE, "train mode dense does not fit a routed model"),
        (replace(HARD, parts="routers"), "mode hard gives routers no gradient"),
        (
            replace(HARD, target_sparsity=0.5, drive="l1"),
            "drive l1 counts the zeros of a dense mod",
        ),
        (replace(SOFT, target_sparsity=0.5), "target sparsity needs a threshold; with top-k"),
    ],
)
def test_what_a_top_k_model_cannot_have(step: Train, message: str, tmp_path: Path) -> None:
    model, _ = routed(build("llama"), TOPK)
    with pytest.raises(ValueError, match=message):
        train(model, step, text(8), tmp_path / "work")
    assert {ffn.mode for ffn in expert_ffns(model)} == {"hard"}
    assert not (tmp_path / "work").exists()


def test_an_encoder_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BertForMaskedLM is neither a causal language model"):
        train(build("bert"), DENSE, text(8), tmp_path)


def test_a_top_k_model_is_trained_without_a_target(tmp_path: Path) -> None:
    model, _ = routed(build("llama"), TOPK)
    randomize(model)
    for mode in ("straight", "hard"):
        step = replace(DENSE, mode=mode, lr=5e-3)
        measured = train(model, step, text(40), tmp_path / mode)
        assert measured["sparsity"] == pytest.approx(1 - 2 / 6)


@pytest.mark.parametrize("losses", [{"lm": 1.0}, {"lm": 1.0, "l1": 0.1}])
def test_fused_experts_learn(losses: dict[str, Any], tmp_path: Path) -> None:
    """Also where a loss looks inside them, for which they are taken apart."""
    model = build("mixtral", hidden_act="relu")
    before = {name: tensor.clone() for name, tensor in host_state_dict(model).items()}
    train(model, replace(DENSE, losses=losses), text(32), tmp_path / "work")
    after = host_state_dict(model)
    experts = [name for name in before if ".experts." in name]
    assert experts and not any(torch.equal(before[name], after[name]) for name in experts)
