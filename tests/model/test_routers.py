"""Routers: scores in fp32 under any dtype, and the target they learn."""

from __future__ import annotations

import pytest
import torch

from moe_tools.model.routers import ROUTERS, SigmoidRouter, expert_log_energy

every_kind = pytest.mark.parametrize("kind", ROUTERS)


@every_kind
def test_a_fresh_router_scores_every_expert_on(kind: str) -> None:
    scores_TE = ROUTERS[kind](4, 3)(torch.randn(2, 5, 4))
    assert scores_TE.shape == (2, 5, 3)
    assert (scores_TE > 0.9).all()


def test_sigmoid_scores_each_expert_alone() -> None:
    router = SigmoidRouter(4, 3)
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(5, 4)
    expected = 1 / (1 + (-(x_TD @ router.weight.T + router.bias)).exp())
    torch.testing.assert_close(router(x_TD), expected, rtol=1e-6, atol=1e-6)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_are_float32_under_any_dtype(kind: str, dtype: torch.dtype) -> None:
    router = ROUTERS[kind](4, 3)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x_TD = torch.randn(5, 4).to(dtype)
    expected = router(x_TD.float())
    assert expected.dtype == torch.float32
    assert torch.equal(router(x_TD), expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(router(x_TD), expected)
        assert torch.equal(router(x_TD.float()), expected)


@every_kind
def test_flops_count_a_multiply_and_an_add_a_weight(kind: str) -> None:
    assert ROUTERS[kind](4, 3).flops() == 2 * 4 * 3


@every_kind
def test_the_target_is_the_log_energy_of_each_expert(kind: str) -> None:
    h_TF, down_FD = torch.randn(5, 6), torch.randn(6, 4)
    target_TE = ROUTERS[kind](4, 3).target_TE(h_TF, down_FD)
    for token in range(5):
        for expert in range(3):
            neurons = range(2 * expert, 2 * expert + 2)
            energy = sum((h_TF[token, n] * down_FD[n].norm()) ** 2 for n in neurons)
            torch.testing.assert_close(target_TE[token, expert], energy.log())


def test_the_energy_of_a_silent_expert_is_finite() -> None:
    energy_TE = expert_log_energy(torch.zeros(2, 6), torch.ones(6), 3)
    assert energy_TE.isfinite().all()
