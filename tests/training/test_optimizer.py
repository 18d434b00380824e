"""MasterAdamW is AdamW on fp32 weights, whatever dtype the weights have."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_tools.training.optimizer import MasterAdamW

OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.01}
SHAPES = ((4, 3), (5,), (2, 2))


def params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=draw).to(dtype) for s in SHAPES]


def run(
    optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range, dtype: torch.dtype
) -> None:
    for step in steps:
        for weight, grad in zip(weights, gradients(step, dtype), strict=True):
            weight.grad = grad.to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


def test_on_fp32_weights_it_is_adamw_step_by_step() -> None:
    mine, theirs = params(), params()
    one = MasterAdamW([{"params": mine}], **OPTIONS)
    other = torch.optim.AdamW([{"params": theirs}], **OPTIONS)
    for step in range(10):
        run(one, mine, range(step, step + 1), torch.float32)
        run(other, theirs, range(step, step + 1), torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_on_bf16_weights_it_is_adamw_on_fp32_rounded() -> None:
    mine = params(torch.bfloat16)
    theirs = [nn.Parameter(weight.detach().float()) for weight in mine]
    one = MasterAdamW([{"params": mine}], **OPTIONS)
    other = torch.optim.AdamW([{"params": theirs}], **OPTIONS)
    for step in range(10):
        run(one, mine, range(step, step + 1), torch.bfloat16)
        run(other, theirs, range(step, step + 1), torch.bfloat16)
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(mine, theirs, strict=True))
        assert all(weight.dtype == torch.bfloat16 for weight in mine)


def test_groups_keep_their_rates_and_may_mix_dtypes() -> None:
    host, router = params(torch.bfloat16), params(seed=1)
    theirs = [nn.Parameter(weight.detach().float()) for weight in host], params(seed=1)
    one = MasterAdamW([{"params": host, "lr": 1e-4}, {"params": router, "lr": 1e-2}], **OPTIONS)
    other = torch.optim.AdamW(
        [{"params": theirs[0], "lr": 1e-4}, {"params": theirs[1], "lr": 1e-2}], **OPTIONS
    )
    for group in (*one.param_groups, *other.param_groups):
        group["lr"] *= 0.5  # as a schedule does
    for weights in (host, router, *theirs):
        for weight, grad in zip(weights, gradients(0), strict=True):
            weight.grad = grad.bfloat16().to(weight.dtype)
    one.step()
    other.step()
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(host, theirs[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(router, theirs[1], strict=True))


def test_tiny_updates_add_up() -> None:
    """Steps of 1e-4 on a weight of 1: half a bf16 step there is 2e-3 to 4e-3."""

    def walk(kind: type[torch.optim.Optimizer], weight: nn.Parameter) -> float:
        optimizer = kind([{"params": [weight]}], lr=1e-4, weight_decay=0.0)  # type: ignore[call-arg]
        for _ in range(500):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.item()

    assert walk(torch.optim.AdamW, nn.Parameter(torch.ones(1, dtype=torch.bfloat16))) == 1.0
    moved = walk(MasterAdamW, nn.Parameter(torch.ones(1, dtype=torch.bfloat16)))
    assert moved == pytest.approx(0.95, abs=0.004)


def test_a_weight_without_gradient_stays() -> None:
    mine = params(torch.bfloat16)
    before = [weight.detach().clone() for weight in mine]
    optimizer = MasterAdamW([{"params": mine}], **OPTIONS)
    mine[0].grad = torch.ones_like(mine[0])
    optimizer.step()
    assert not torch.equal(mine[0], before[0])
    assert torch.equal(mine[1], before[1]) and torch.equal(mine[2], before[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_cleared_from_the_weights(dtype: torch.dtype) -> None:
    mine = params(dtype)
    optimizer = MasterAdamW([{"params": mine}], **OPTIONS)
    for weight in mine:
        weight.grad = torch.ones_like(weight)
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_identically(dtype: torch.dtype) -> None:
    through = params(dtype)
    optimizer = MasterAdamW([{"params": through}], **OPTIONS)
    run(optimizer, through, range(5), dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    weights = [weight.detach().clone() for weight in through]
    run(optimizer, through, range(5, 10), dtype)

    again = [nn.Parameter(weight) for weight in weights]
    resumed = MasterAdamW([{"params": again}], **OPTIONS)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, again, range(5, 10), dtype)
    assert all(torch.equal(a, b) for a, b in zip(through, again, strict=True))


def test_the_state_of_another_model_is_refused() -> None:
    optimizer = MasterAdamW([{"params": params(torch.bfloat16)}], **OPTIONS)
    other = MasterAdamW([{"params": params()}], **OPTIONS)
    with pytest.raises(ValueError, match="zip"):
        optimizer.load_state_dict(other.state_dict())


# --- gradients of several passes


def summed(sums: bool, grads: list[float]) -> tuple[MasterAdamW, nn.Parameter]:
    """A bf16 weight of 1 after passes with these gradients, one after the other."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([{"params": [weight]}], lr=0.1, weight_decay=0.0)
    if sums:
        optimizer.sum_in_fp32()
    for grad in grads:
        (weight.float() * grad).sum().backward()
    return optimizer, weight


def test_small_gradients_of_many_passes_add_up() -> None:
    """1 + 256 * 2^-9 - 1 is 1/2; in bf16, 1 + 2^-9 is 1."""
    grads = [1.0, *[2.0**-9] * 256, -1.0]
    optimizer, weight = summed(True, grads)
    optimizer.gather()
    (master,) = optimizer.masters()
    assert master.grad is not None and master.grad.item() == 0.5
    optimizer.step()
    assert weight.item() == pytest.approx(0.9, abs=0.004)
    optimizer, weight = summed(False, grads)
    optimizer.step()
    assert weight.item() == 1.0  # the update is lost


def test_one_pass_holds_no_second_copy_of_its_gradients() -> None:
    optimizer, weight = summed(False, [1.0])
    (master,) = optimizer.masters()
    assert master.grad is None and weight.grad is not None
    optimizer.gather()
    assert weight.grad is None and master.grad is not None
    optimizer, weight = summed(True, [1.0, 1.0])
    (master,) = optimizer.masters()
    assert weight.grad is None and master.grad.item() == 2.0


@pytest.mark.parametrize("sums", [False, True])
def test_the_norm_is_that_of_the_fp32_gradients(sums: bool) -> None:
    optimizer, weight = summed(sums, [300.0, 300.0])
    assert optimizer.clip(1.0).item() == 600.0
    (master,) = optimizer.masters()
    assert master.grad.item() == pytest.approx(1.0, abs=1e-5)
    optimizer.step()
    assert weight.grad is None and master.grad is None


def test_fp32_weights_are_clipped_beside_bf16_ones() -> None:
    host, router = params(torch.bfloat16), params(seed=1)
    optimizer = MasterAdamW([{"params": host}, {"params": router}], **OPTIONS)
    for weight in (*host, *router):
        weight.grad = torch.ones_like(weight)
    numbers = 2 * sum(weight.numel() for weight in host)
    assert optimizer.clip(1.0).item() == pytest.approx(numbers**0.5)
    assert router[0].grad.flatten()[0].item() == pytest.approx(numbers**-0.5)


def test_a_weight_is_left_as_it_was_found() -> None:
    """Nothing stays that would take its gradients away from it."""
    optimizer, weight = summed(True, [1.0])
    optimizer.close()
    (weight.float() * 3).sum().backward()
    assert weight.grad is not None and weight.grad.item() == 3.0
