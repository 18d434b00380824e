"""The experts of an MoE host, interpreted: few tokens under a mask, many grouped by expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_tools.kernels.activations import Act
from moe_tools.kernels.moe import ExpertWeights, moe_ffn

pytest.importorskip("triton")

from triton.runtime.interpreter import interpreter_builder

from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.config import MOST_TOGETHER, Config
from moe_tools.kernels.triton.grouped_call import GroupedCall
from moe_tools.kernels.triton.kernel_launch import KernelLaunch
from moe_tools.kernels.triton.launches import (
    forward_launches,
    grouped_backward_launches,
    grouped_launches,
)
from moe_tools.kernels.triton.moe import moe_ffn_triton
from moe_tools.kernels.triton.op_grouped import grouped_backward, grouped_forward
from tests.host_reads import NoHostReads
from tools.traffic import count_loads

TINY = Config(16, 16, 16, 16, 16, 16, 2, 4)
FEW, MANY = 5, MOST_TOGETHER + 7
EXPERTS, NEURONS, WIDTH, CHOSEN = 4, 11, 19, 2
NAMES = ("x_TD", "gate_XND", "up_XND", "down_XND", "weight_TK")
few_or_many = pytest.mark.parametrize("tokens", [1, FEW, MANY])


def make(
    act: str | Act = "silu", up_act: str = "identity", dtype: torch.dtype = torch.float32
) -> ExpertWeights:
    """Gate and up in one tensor and W_down as its host stores it, all wanting gradients."""
    gate_up = torch.randn(EXPERTS, 2 * NEURONS, WIDTH).to(dtype).requires_grad_()
    down = torch.randn(EXPERTS, WIDTH, NEURONS).to(dtype).requires_grad_()
    gate_XND, up_XND = gate_up.unflatten(1, (2, NEURONS)).unbind(1)
    return ExpertWeights(gate_XND, up_XND, down.transpose(1, 2), act, up_act)


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, the chosen experts (the last never) and their weights."""
    x_TD = torch.randn(tokens, WIDTH).to(dtype).requires_grad_()
    chosen_TK = torch.rand(tokens, EXPERTS - 1).topk(CHOSEN).indices
    return x_TD, chosen_TK, torch.rand(tokens, CHOSEN).requires_grad_()


def everything(
    experts: ExpertWeights, x_TD: Tensor, y_TD: Tensor, weight_TK: Tensor
) -> dict[str, Tensor]:
    """y and its gradients, by name."""
    wanted = (x_TD, experts.gate_XND, experts.up_XND, experts.down_XND, weight_TK)
    draw = torch.Generator(y_TD.device).manual_seed(1)
    dy_TD = torch.randn(y_TD.shape, generator=draw).to(y_TD.dtype)
    return dict(zip(NAMES, torch.autograd.grad(y_TD, wanted, dy_TD), strict=True)) | {"y_TD": y_TD}


def assert_equals_reference(experts: ExpertWeights, tokens: int, tolerance: float) -> None:
    """Relative to an element and to the largest one."""
    x_TD, chosen_TK, weight_TK = inputs(tokens, experts.gate_XND.dtype)
    y_TD = moe_ffn_triton(experts, x_TD, chosen_TK, weight_TK, config=TINY)
    expected_TD = moe_ffn(experts, x_TD, chosen_TK, weight_TK, backend="reference")
    ours = everything(experts, x_TD, y_TD, weight_TK)
    for name, tensor in everything(experts, x_TD, expected_TD, weight_TK).items():
        largest = tensor.abs().max().item()
        assert ours[name].dtype == tensor.dtype, name
        torch.testing.assert_close(
            ours[name],
            tensor,
            rtol=tolerance,
            atol=tolerance * largest,
            msg=lambda text, n=name: n + text,
        )


@few_or_many
@pytest.mark.parametrize(
    ("act", "up_act"),
    [
        ("silu", "identity"),
        ("relu", "identity"),
        ("relu", "relu"),
        (Act("fatrelu", 0.5), "identity"),
    ],
    ids=["silu", "relu", "drelu", "fatrelu"],
)
def test_y_and_every_gradient_equal_the_reference(act: str | Act, up_act: str, tokens: int) -> None:
    assert_equals_reference(make(act, up_act), tokens, 2e-5)


@few_or_many
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str
)
def test_half_precision(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    assert_equals_reference(make(dtype=dtype), tokens, tolerance)


def test_pinned_tiles_serve_groups() -> None:
    experts, (x_TD, chosen_TK, weight_TK) = make(), inputs(MANY)
    with torch.no_grad():
        y_TD = moe_ffn(experts, x_TD, chosen_TK, weight_TK, backend="triton")
        expected_TD = moe_ffn(experts, x_TD, chosen_TK, weight_TK, backend="reference")
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, FEW, MANY])
def test_all_tokens_may_choose_one_expert(tokens: int) -> None:
    experts = make()
    x_TD, chosen_TK = torch.randn(tokens, WIDTH), torch.full((tokens, 1), 2)
    weight_TK = torch.rand(tokens, 1)
    y_TD = moe_ffn_triton(experts, x_TD, chosen_TK, weight_TK, config=TINY)
    expected_TD = moe_ffn(experts, x_TD, chosen_TK, weight_TK, backend="reference")
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-4)


def turned(neurons: int) -> Tensor:
    """Stored neuron by neuron, all experts' first rows first."""
    return torch.randn(neurons, EXPERTS, WIDTH).requires_grad_().transpose(0, 1)


VIEWS: dict[str, Callable[[int], Tensor]] = {
    "turned": turned,
    "one row": lambda n: torch.randn(EXPERTS, 1, WIDTH).requires_grad_().expand(-1, n, -1),
    "one expert": lambda n: torch.randn(1, n, WIDTH).requires_grad_().expand(EXPERTS, -1, -1),
    "some columns": lambda n: torch.randn(EXPERTS, n, WIDTH + 3).requires_grad_()[..., 1:-2],
    "some rows": lambda n: torch.randn(EXPERTS, 2 * n + 1, WIDTH).requires_grad_()[:, 1::2],
}


@few_or_many
@pytest.mark.parametrize("neurons", [1, NEURONS])
@pytest.mark.parametrize("view", VIEWS)
def test_experts_may_be_views(view: str, neurons: int, tokens: int) -> None:
    experts = ExpertWeights(*(VIEWS[view](neurons) for _ in range(3)), act="silu")
    assert_equals_reference(experts, tokens, 2e-5)


@few_or_many
def test_the_routing_and_x_may_be_views(tokens: int) -> None:
    experts, (x_TD, chosen_TK, weight_TK) = make(), inputs(tokens)
    expected_TD = moe_ffn(experts, x_TD, chosen_TK, weight_TK, backend="reference")
    views = (x_TD.T.contiguous().T, chosen_TK.T.contiguous().T, weight_TK.T.contiguous().T)
    y_TD = moe_ffn_triton(experts, *views, config=TINY)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
@few_or_many
def test_experts_without_tokens_are_not_read(tokens: int) -> None:
    experts, (x_TD, chosen_TK, weight_TK) = make(), inputs(tokens)
    laid_out = replace(experts, down_XND=experts.down_XND.detach().contiguous())
    with count_loads() as loads, torch.no_grad():
        moe_ffn_triton(laid_out, x_TD, chosen_TK, weight_TK, config=TINY)
    chosen = chosen_TK.unique().tolist()
    per_tile = torch.bincount(chosen_TK.flatten(), minlength=EXPERTS)
    times = (-(-per_tile // MOST_TOGETHER)) if tokens > MOST_TOGETHER else per_tile.clamp(max=1)
    for weight_XND in (laid_out.gate_XND, laid_out.up_XND, laid_out.down_XND):
        for expert in range(EXPERTS):
            rows_ND = weight_XND[expert]
            assert bool(loads.rows_of(rows_ND)) == (expert in chosen)
            once = NEURONS * WIDTH * rows_ND.element_size()
            assert loads.bytes_of(rows_ND) == int(times[expert]) * once


@pytest.mark.interpreter
def test_drelu_reads_the_neurons_that_fire() -> None:
    experts, (x_TD, chosen_TK, weight_TK) = make("relu", "relu"), inputs(1)
    laid_out = replace(experts, down_XND=experts.down_XND.detach().contiguous())
    with count_loads() as loads, torch.no_grad():
        moe_ffn_triton(laid_out, x_TD, chosen_TK, weight_TK, config=TINY)
    for expert in chosen_TK[0].tolist():
        gate_N = laid_out.gate_XND[expert] @ x_TD[0] > 0
        up_N = laid_out.up_XND[expert] @ x_TD[0] > 0
        fires = gate_N.nonzero().flatten().tolist()
        both = (gate_N & up_N).nonzero().flatten().tolist()
        assert loads.rows_of(laid_out.gate_XND[expert]) == list(range(NEURONS))
        assert loads.rows_of(laid_out.up_XND[expert]) == fires
        assert loads.rows_of(laid_out.down_XND[expert]) == both


@pytest.mark.interpreter
def test_the_order_of_programs_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, (x_TD, chosen_TK, weight_TK) = make(), inputs(MANY)

    def run() -> dict[str, Tensor]:
        y_TD = moe_ffn_triton(experts, x_TD, chosen_TK, weight_TK, config=TINY)
        return everything(experts, x_TD, y_TD, weight_TK)

    forwards, place = run(), interpreter_builder.set_grid_idx

    def backwards(*index: int) -> None:
        place(*(n - 1 - i for n, i in zip(interpreter_builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    for name, tensor in run().items():
        assert torch.equal(tensor, forwards[name]), name


def test_groups_are_three_launches_and_four_back() -> None:
    def blank(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    names = ("gate_XND", "up_XND", "down_XND")
    call = GroupedCall(
        x_TD=blank(MANY, WIDTH),
        chosen_TK=blank(MANY, CHOSEN, dtype=torch.int64),
        weight_TK=blank(MANY, CHOSEN),
        **{name: blank(EXPERTS, NEURONS, WIDTH) for name in names},
    )
    launches, y_PD = grouped_launches(call)
    assert [one.name for one in launches] == [
        "group_pairs",
        "compute_pairs_hidden",
        "combine_pairs",
    ]
    assert y_PD.shape == (MANY * CHOSEN, WIDTH)
    assert call.tiles == -(-MANY * CHOSEN // 64) + EXPERTS
    back, made = grouped_backward_launches(call, blank(MANY, WIDTH))
    assert len(back) == 4
    assert made.down_XND.shape == call.down_XND.shape


def test_opcheck_is_clean() -> None:
    experts, (x_TD, chosen_TK, weight_TK) = make(), inputs(MANY)
    rows = (experts.gate_XND, experts.up_XND, experts.down_XND.contiguous())
    leaves = [one.detach().requires_grad_() for one in rows]
    options = {
        **{"act": "silu", "up_act": "identity", "threshold": 0.0, "up_threshold": 0.0},
        "config": TINY.numbers,
    }
    torch.library.opcheck(grouped_forward, (x_TD, *leaves, chosen_TK, weight_TK), options)
    detached = [one.detach() for one in (x_TD, *rows)]
    back = (torch.randn(MANY, WIDTH), *detached, chosen_TK, weight_TK.detach())
    torch.library.opcheck(grouped_backward, back, options)


@few_or_many
def test_the_host_reads_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the operators; inside them, launches are made of tensors without data."""
    monkeypatch.setattr(KernelLaunch, "run", lambda launch: None)
    experts, (x_TD, chosen_TK, weight_TK) = make("relu"), inputs(tokens)
    with NoHostReads():
        y_TD = moe_ffn_triton(experts, x_TD, chosen_TK, weight_TK)
        everything(experts, x_TD, y_TD, weight_TK)
    with pytest.raises(AssertionError, match="the host reads the device"), NoHostReads():
        moe_ffn(experts, x_TD, chosen_TK, weight_TK, backend="reference")


def test_launches_need_no_data() -> None:
    """The launches of a layer are the same whatever it chose, so a CUDA graph may hold them."""
    gate_up = torch.empty(EXPERTS, 2 * NEURONS, WIDTH, device="meta")
    call = Call(
        x_TD=torch.empty(1, WIDTH, device="meta"),
        gate_FD=gate_up[:, :NEURONS],
        up_FD=gate_up[:, NEURONS:],
        down_FD=torch.empty(EXPERTS, NEURONS, WIDTH, device="meta"),
        mask_TE=torch.empty(1, EXPERTS, device="meta"),
    )
    launches, _ = forward_launches(call)
    assert len(launches) == 3
    assert call.grouping == {"group": NEURONS, "skip": NEURONS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act": torch.tanh}, "^backend 'triton' knows activations by name"),
        (
            {"up_XND": torch.zeros(EXPERTS, NEURONS, WIDTH).half()},
            "^x_TD and the experts are torch",
        ),
    ],
    ids=["function", "dtypes"],
)
def test_what_the_kernels_cannot_run_is_named(
    changes: dict[str, Any], message: str, default_device: torch.device
) -> None:
    here = {
        k: one.to(default_device) if isinstance(one, Tensor) else one for k, one in changes.items()
    }
    x_TD, chosen_TK, weight_TK = inputs(FEW)
    with pytest.raises(ValueError, match=message):
        moe_ffn(replace(make(), **here), x_TD, chosen_TK, weight_TK, backend="triton")
