"""Training with the kernels: gradients by name are those of the masked pass, and the log says why.

The kernels are interpreted here, and CPU tensors are taken for those of a GPU.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts import training_kernels
from moe_tools.experts.conversion import attach_experts, set_mode
from moe_tools.experts.experts import expert_ffns
from tests.families import UNEVEN, build, of_size, randomize

pytest.importorskip("triton")

from moe_tools.kernels.triton import limits
from moe_tools.kernels.triton.kernel_launch import KernelLaunch

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_kernels, "on_gpu", lambda tensor: True)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card on which the kernels always pay."""
    monkeypatch.setattr(limits, "UNTUNED", {64: 1.0})


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    seen: list[str] = []
    launch = KernelLaunch.run

    def recorded(self: KernelLaunch) -> None:
        seen.append(self.name)
        launch(self)

    monkeypatch.setattr(KernelLaunch, "run", recorded)
    return seen


def make(family: str = "llama", **conversion: Any) -> PreTrainedModel:
    model = build(family)
    attach_experts(model, replace(of_size(UNEVEN), **conversion))
    randomize(model)
    for ffn in expert_ffns(model):
        if ffn.off_F is not None:
            ffn.off_F.normal_()
    return model.train()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The loss and all gradients, by name; zero where none arrived."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
    }
    return grads | {"loss": loss.detach()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, expected in theirs.items():
        largest = float(expected.abs().max())
        atol = 1e-5 * largest + 1e-7  # some are zero but for rounding, such as those of k_proj.bias
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=atol, msg=name)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("when_off", ["zero", "mean"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "mixtral"])
def test_gradients_are_those_of_the_masked_pass(
    family: str, when_off: str, run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(family, when_off=when_off)
    masked = copy.deepcopy(model)
    ours = gradients(model)
    assert run.count("compute_weight_grads") == len(expert_ffns(model))
    run.clear()
    monkeypatch.setattr(training_kernels, "on_gpu", lambda tensor: False)
    theirs = gradients(masked)
    assert not run
    assert_same(ours, theirs)


@pytest.mark.usefixtures("always")
def test_a_checkpointed_pass_is_computed_again_in_the_same_way(run: list[str]) -> None:
    model = make()
    plain = gradients(copy.deepcopy(model))
    model.gradient_checkpointing_enable()
    run.clear()
    assert_same(gradients(model), plain)
    assert run.count("combine") == 3 * len(expert_ffns(model))  # forward twice, and dx


def test_the_choice_stands_where_two_passes_are_checkpointed_before_one_backward(
    run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_kernels, "EVERY", 1)
    model = make()
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first = model(input_ids=IDS).logits.square().mean()
    monkeypatch.setattr(limits, "UNTUNED", {64: 1.0})  # from here on they would pay
    (first + model(input_ids=IDS).logits.square().mean()).backward()
    assert not run


@pytest.mark.usefixtures("always")
def test_autocast_computes_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with torch.autocast("cpu", dtype=torch.float16):
        ours = gradients(model)
        monkeypatch.setattr(training_kernels, "on_gpu", lambda tensor: False)
        theirs = gradients(model)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        largest = float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=0.1, atol=2e-2 * largest, msg=name)


def test_a_large_union_is_computed_whole_and_the_log_says_so(
    run: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    with caplog.at_level(logging.INFO, "moe_tools"):
        gradients(model), gradients(model)
    assert not run
    lines = [one.getMessage() for one in caplog.records if "want" in one.getMessage()]
    assert len(lines) == len(expert_ffns(model))  # once, not at every look
    assert lines[0].endswith("the kernels pay up to 10 %: all are computed, then masked")


def test_a_small_union_is_seen_at_the_next_look(
    run: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_kernels, "EVERY", 2)
    model = make()
    gradients(model)
    for ffn in expert_ffns(model):
        nn.init.constant_(ffn.router.bias, -100.0)
    gradients(model)
    assert not run
    with caplog.at_level(logging.INFO, "moe_tools"):
        gradients(model)
    assert run
    assert "want 0 % of the neurons" in caplog.text and "they compute these alone" in caplog.text


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("change", ["soft", "straight", "eval", "hook", "adapter"])
def test_what_the_kernels_do_not_compute_stays_masked(change: str, run: list[str]) -> None:
    model = make()
    ffns = expert_ffns(model)
    if change in ("soft", "straight"):
        set_mode(model, change)
    elif change == "eval":
        model.eval()
    elif change == "hook":
        for ffn in ffns:
            ffn.projections.up.register_forward_hook(lambda *_: None)
    else:
        for ffn in ffns:
            ffn.up_proj = nn.Sequential(ffn.up_proj)
    with torch.no_grad():
        model(input_ids=IDS)
    assert not run


def test_the_union_is_that_of_a_tile() -> None:
    mask_TE = torch.zeros(130, 4, dtype=torch.bool)
    mask_TE[3, 0] = mask_TE[70, 1] = mask_TE[71, 2] = True
    assert training_kernels.union_share(mask_TE, 8) == pytest.approx((1 + 2 + 0) / 12)
