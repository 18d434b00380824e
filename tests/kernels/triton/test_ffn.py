"""The Triton kernels, interpreted, against the reference: y and every gradient by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.kernels import sparse_ffn as kernels
from moe_tools.kernels.activations import Act
from moe_tools.kernels.reference import sparse_ffn_reference
from moe_tools.kernels.sparse_ffn import backends, pack, sparse_ffn
from moe_tools.kernels.weights import FFNWeights

triton = pytest.importorskip("triton")

from triton.runtime.interpreter import interpreter_builder  # noqa: E402

from moe_tools.kernels.triton.call import CONTIGUOUS, Call  # noqa: E402
from moe_tools.kernels.triton.config import Config, candidates  # noqa: E402
from moe_tools.kernels.triton.ffn import sparse_ffn_triton  # noqa: E402
from moe_tools.kernels.triton.op import backward, forward  # noqa: E402
from moe_tools.kernels.triton.tune import tune  # noqa: E402

TINY = Config(16, 16, 4, 16, 8, 16, 2, 4)
"""Tiles so small that the shapes below need several of each."""
MASKS: dict[str, Callable[[int, int], Tensor | None]] = {
    "random": lambda tokens, experts: torch.rand(tokens, experts) < 0.4,
    "empty": lambda tokens, experts: torch.zeros(tokens, experts, dtype=torch.bool),
    "full": lambda tokens, experts: torch.ones(tokens, experts, dtype=torch.bool),
    "one": lambda tokens, experts: torch.eye(tokens, experts).roll(1, -1).bool(),
    "soft": lambda tokens, experts: torch.rand(tokens, experts) * (torch.rand(tokens, 1) < 0.7),
    "none": lambda tokens, experts: None,
}
NAMES = ("up_FD", "down_FD", "gate_FD", "up_F", "gate_F", "down_D")
# (D, E, F)
SHAPES = [(1, 1, 1), (5, 3, 13), (13, 7, 7), (19, 1, 9), (37, 7, 52), (48, 5, 40)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(
    shape: tuple[int, int, int],
    *,
    act: str | Act = "silu",
    up_act: str = "identity",
    gated: bool = True,
    biases: bool = True,
    dtype: torch.dtype = torch.float32,
) -> FFNWeights:
    """Random weights that want gradients."""
    width, _, neurons = shape
    sizes: dict[str, tuple[int, ...]] = {"up_FD": (neurons, width), "down_FD": (neurons, width)}
    if biases:
        sizes |= {"up_F": (neurons,), "down_D": (width,)}
    if gated:
        sizes |= {"gate_FD": (neurons, width)} | ({"gate_F": (neurons,)} if biases else {})
    made = {name: torch.randn(size).to(dtype).requires_grad_() for name, size in sizes.items()}
    return FFNWeights(act=act, up_act=up_act if gated else "identity", **made)


def operands(weights: FFNWeights, x_TD: Tensor, mask_TE: Tensor | None) -> dict[str, Tensor]:
    """Everything that has a gradient, by name."""
    found = {"x_TD": x_TD, "mask_TE": mask_TE} | {name: getattr(weights, name) for name in NAMES}
    return {name: t for name, t in found.items() if t is not None and t.requires_grad}


def gradients(y_TD: Tensor, wanted: dict[str, Tensor], dy_TD: Tensor) -> dict[str, Tensor]:
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(y_TD, list(wanted.values()), dy_TD, **options)
    return dict(zip(wanted, found, strict=True))


def assert_equals_reference(
    weights: FFNWeights,
    x_TD: Tensor,
    mask_TE: Tensor | None,
    rtol: float,
    atol: float,
    **options: Any,
) -> None:
    """y and all gradients; tolerances are relative to an element and to the largest one."""
    if mask_TE is not None and mask_TE.dtype.is_floating_point:
        mask_TE.requires_grad_()
    wanted = operands(weights, x_TD, mask_TE)
    y_TD = sparse_ffn_triton(weights, x_TD, mask_TE, **options)
    expected_TD = sparse_ffn_reference(weights, x_TD, mask_TE)
    assert y_TD.dtype == expected_TD.dtype
    dy_TD = torch.randn(y_TD.shape).to(y_TD.dtype)
    ours = gradients(y_TD, wanted, dy_TD) | {"y_TD": y_TD}
    theirs = gradients(expected_TD, wanted, dy_TD) | {"y_TD": expected_TD}
    if mask_TE is not None and "mask_TE" in theirs:  # hard: what is off is not computed
        theirs["mask_TE"] = theirs["mask_TE"] * (mask_TE != 0)
    for name, tensor in theirs.items():
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        torch.testing.assert_close(
            ours[name], tensor, rtol=rtol, atol=atol * largest, msg=lambda text, n=name: n + text
        )


def inputs(tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, width).to(dtype).requires_grad_()


@every_shape
@pytest.mark.parametrize("tokens", [1, 3, 33])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_y_and_every_gradient_equal_the_reference(
    shape: tuple[int, int, int], tokens: int, gated: bool
) -> None:
    mask_TE = MASKS["random"](tokens, shape[1])
    weights = make(shape, gated=gated)
    assert_equals_reference(weights, inputs(tokens, shape[0]), mask_TE, 1e-5, 1e-6, config=TINY)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_every_mask(mask: str, tokens: int, act: str) -> None:
    shape = (19, 7, 45)
    mask_TE = MASKS[mask](tokens, shape[1])
    weights = make(shape, act=act, biases=False)
    assert_equals_reference(weights, inputs(tokens, 19), mask_TE, 1e-5, 1e-6, config=TINY)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize(
    "act",
    [
        *("identity", "relu", "relu2", "silu", "gelu", "gelu_tanh"),
        *(Act("fatrelu", 0.5), Act("shifted_relu", 0.5)),
    ],
    ids=str,
)
def test_every_activation(act: str | Act, gated: bool, tokens: int) -> None:
    weights = make((19, 7, 45), act=act, gated=gated)
    mask_TE = MASKS["random"](tokens, 7)
    assert_equals_reference(weights, inputs(tokens, 19), mask_TE, 1e-5, 1e-6, config=TINY)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("gate_first", [True, False])
def test_drelu_is_relu_on_both(tokens: int, gate_first: bool) -> None:
    weights = make((19, 7, 45), act="relu", up_act="relu")
    options: dict[str, Any] = {"config": TINY, "gate_first": gate_first}
    assert_equals_reference(weights, inputs(tokens, 19), None, 1e-5, 1e-6, **options)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("mask", ["random", "soft", "empty"])
@pytest.mark.parametrize("act", ["silu", "relu"])
def test_what_is_off_adds_its_constant(act: str, mask: str, tokens: int) -> None:
    weights = replace(make((19, 7, 45), act=act), off_F=torch.randn(45))
    mask_TE = MASKS[mask](tokens, 7)
    assert_equals_reference(weights, inputs(tokens, 19), mask_TE, 1e-5, 1e-5, config=TINY)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_half_precision(dtype: torch.dtype, tolerance: float, act: str, tokens: int) -> None:
    shape = (37, 7, 52)
    weights, mask_TE = make(shape, act=act, dtype=dtype), MASKS["soft"](tokens, 7)
    x_TD = inputs(tokens, shape[0], dtype)
    assert_equals_reference(weights, x_TD, mask_TE, tolerance, tolerance, config=TINY)


@pytest.mark.parametrize("tokens", range(1, 34, 4))
def test_pinned_tiles_serve_every_batch(tokens: int) -> None:
    shape = (40, 16, 136)
    weights = make(shape, biases=False)
    mask_TE = MASKS["random"](tokens, shape[1])
    assert_equals_reference(weights, inputs(tokens, shape[0]), mask_TE, 1e-5, 1e-6)


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(1, 9),
    width=st.integers(1, 24),
    neurons=st.integers(1, 40),
    share=st.floats(0, 1),
    data=st.data(),
)
def test_any_shape(tokens: int, width: int, neurons: int, share: float, data: Any) -> None:
    experts = data.draw(st.integers(1, neurons))
    weights = make((width, experts, neurons), act="gelu")
    x_TD, mask_TE = inputs(tokens, width), torch.rand(tokens, experts) < share
    with torch.no_grad():
        y_TD = sparse_ffn_triton(weights, x_TD, mask_TE, config=TINY)
        expected_TD = sparse_ffn_reference(weights, x_TD, mask_TE)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-4, atol=1e-4)


def test_more_tokens_than_one_tile_holds() -> None:
    weights = make((8, 3, 9), act="relu")
    mask_TE = MASKS["soft"](70, 3)
    assert_equals_reference(weights, inputs(70, 8), mask_TE, 1e-5, 1e-6, config=TINY)


def test_no_tokens() -> None:
    weights = make((8, 3, 9))
    x_TD = inputs(0, 8)
    y_TD = sparse_ffn_triton(weights, x_TD, torch.ones(0, 3))
    y_TD.sum().backward()
    assert y_TD.shape == (0, 8)
    assert weights.up_FD.grad is not None and not weights.up_FD.grad.any()


def test_leading_dimensions_stay() -> None:
    weights = make((8, 3, 9))
    x_TD, mask_TE = torch.randn(2, 3, 8), torch.rand(2, 3, 3) < 0.5
    y_TD = sparse_ffn(
        x_TD,
        mask_TE=mask_TE,
        **{name: getattr(weights, name) for name in (*NAMES, "act")},
        backend="triton",
    )
    expected_TD = sparse_ffn_reference(weights, x_TD, mask_TE)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-5)


def test_rows_may_be_slices_of_a_fused_weight() -> None:
    fused = torch.randn(2 * 9, 8)
    weights = replace(make((8, 3, 9)), gate_FD=fused[:9], up_FD=fused[9:], down_FD=fused[::2])
    x_TD, mask_TE = inputs(2, 8), MASKS["random"](2, 3)
    assert_equals_reference(weights, x_TD, mask_TE, 1e-5, 1e-6, config=TINY)


# What a tensor of these sizes may be a view of.
VECTORS: dict[str, Callable[[int], Tensor]] = {
    "half of a fused one": lambda size: torch.randn(size, 2).flatten()[1::2],
    "one number": lambda size: torch.randn(1).expand(size),
}
MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "every third row": lambda rows, width: torch.randn(3 * rows, width)[1::3],
    "some columns": lambda rows, width: torch.randn(rows, width + 3)[:, 1 : width + 1],
    "one row": lambda rows, width: torch.randn(1, width).expand(rows, width),
}


@pytest.mark.parametrize(("act", "tokens"), [("silu", 1), ("relu", 5)])
@pytest.mark.parametrize("view", VECTORS)
@pytest.mark.parametrize(
    ("name", "gated"),
    [("gate_F", True), ("up_F", True), ("down_D", True), ("up_F", False), ("down_D", False)],
    ids=["gate_F", "up_F", "down_D", "up_F-plain", "down_D-plain"],
)
def test_a_bias_may_be_a_view(name: str, gated: bool, view: str, act: str, tokens: int) -> None:
    weights = make((19, 7, 45), act=act, gated=gated)
    bias = VECTORS[view](getattr(weights, name).numel())
    assert not bias.is_contiguous()
    weights = replace(weights, **{name: bias.requires_grad_()})
    mask_TE = MASKS["random"](tokens, 7)
    assert_equals_reference(weights, inputs(tokens, 19), mask_TE, 1e-5, 1e-6, config=TINY)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("view", MATRICES)
@pytest.mark.parametrize("name", NAMES[:3])
def test_rows_may_be_a_view(name: str, view: str, tokens: int) -> None:
    rows_FD = MATRICES[view](45, 19).requires_grad_()
    weights = replace(make((19, 7, 45), act="relu"), **{name: rows_FD})
    mask_TE = MASKS["random"](tokens, 7)
    assert_equals_reference(weights, inputs(tokens, 19), mask_TE, 1e-5, 1e-6, config=TINY)


@pytest.mark.parametrize("neurons", [1, 9])
@pytest.mark.parametrize("width", [1, 8])
def test_a_row_of_one_number_has_any_stride(width: int, neurons: int) -> None:
    weights = make((width, 1, neurons))
    turned = {name: torch.randn(width, neurons).T.requires_grad_() for name in NAMES[:3]}
    if width > 1 and neurons > 1:
        with pytest.raises(ValueError, match=r"^up_FD has strides \(1, 9\): "):
            sparse_ffn_triton(replace(weights, **turned), torch.randn(2, width))
        turned = {name: rows_FD.contiguous() for name, rows_FD in turned.items()}
    weights = replace(weights, **turned)
    assert_equals_reference(weights, inputs(2, width), None, 1e-5, 1e-6, config=TINY)


@pytest.mark.parametrize("view", MATRICES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_x_the_mask_and_dy_may_be_views(tokens: int, view: str) -> None:
    weights = make((19, 7, 45))
    x_TD = MATRICES[view](tokens, 19).requires_grad_()
    mask_TE, dy_TD = MATRICES[view](tokens, 7), MATRICES[view](tokens, 19)
    wanted = operands(weights, x_TD, mask_TE.requires_grad_())
    y_TD = sparse_ffn_triton(weights, x_TD, mask_TE, config=TINY)
    ours = gradients(y_TD, wanted, dy_TD) | {"y_TD": y_TD}
    theirs = gradients(sparse_ffn_reference(weights, x_TD, mask_TE), wanted, dy_TD)
    theirs["mask_TE"] = theirs["mask_TE"] * (mask_TE != 0)
    theirs["y_TD"] = sparse_ffn_reference(weights, x_TD, mask_TE)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", CONTIGUOUS)
def test_a_view_that_reaches_the_launches_is_our_own_mistake(name: str) -> None:
    """They have no strides for it, and would read the wrong numbers."""
    rows = {name: torch.randn(9, 8) for name in ("gate_FD", "up_FD", "down_FD")}
    whole = {"x_TD": torch.randn(2, 8), "mask_TE": torch.rand(2, 3), "down_D": torch.randn(8)}
    view = torch.stack([whole.get(name, torch.randn(9))] * 2, -1)[..., 0]
    with pytest.raises(AssertionError, match=f"^{name} has strides"):
        Call(**{**whole, **rows, name: view})


def test_what_is_off_may_be_infinite() -> None:
    weights = make((8, 3, 9), biases=False)
    mask_TE = torch.tensor([[True, False, True]])
    poisoned = replace(weights, **{n: getattr(weights, n).detach().clone() for n in NAMES[:3]})
    for name in NAMES[:3]:
        getattr(poisoned, name)[3:6] = float("nan")
    x_TD = torch.randn(1, 8)
    y_TD = sparse_ffn_triton(poisoned, x_TD, mask_TE)
    assert torch.equal(y_TD, sparse_ffn_triton(weights, x_TD, mask_TE))


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_order_of_programs_does_not_change_a_bit(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, x_TD = make((40, 7, 52)), inputs(tokens, 40)
    mask_TE = MASKS["soft"](tokens, 7).requires_grad_()
    wanted = operands(weights, x_TD, mask_TE)

    def everything() -> dict[str, Tensor]:
        y_TD = sparse_ffn_triton(weights, x_TD, mask_TE, config=TINY)
        return gradients(y_TD, wanted, torch.ones_like(y_TD)) | {"y_TD": y_TD}

    forwards = everything()
    place = interpreter_builder.set_grid_idx

    def backwards(*index: int) -> None:
        place(*(n - 1 - i for n, i in zip(interpreter_builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    for name, tensor in everything().items():
        assert torch.equal(tensor, forwards[name]), name


@pytest.mark.parametrize("tokens", [1, 4])
def test_shares_may_be_added_by_a_launch_of_their_own(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, x_TD, mask_TE = make((40, 7, 52)), inputs(tokens, 40), MASKS["random"](tokens, 7)
    y_TD = sparse_ffn_triton(weights, x_TD, mask_TE, config=TINY)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert torch.equal(sparse_ffn_triton(weights, x_TD, mask_TE, config=TINY), y_TD)
    assert_equals_reference(weights, x_TD, mask_TE, 1e-5, 1e-6, config=TINY)


@pytest.mark.parametrize("tokens", [1, 4])
def test_atomic_sums_agree(tokens: int) -> None:
    mask_TE = MASKS["random"](tokens, 7)
    options: dict[str, Any] = {"config": TINY, "atomic": True}
    weights = make((40, 7, 52))
    assert_equals_reference(weights, inputs(tokens, 40), mask_TE, 1e-5, 1e-6, **options)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("soft", [True, False])
def test_opcheck_is_clean(gated: bool, soft: bool) -> None:
    weights, x_TD = make((8, 3, 9), gated=gated), inputs(2, 8)
    mask_TE = MASKS["soft" if soft else "random"](2, 3)
    assert mask_TE is not None
    second = weights.up_FD if gated else None
    biases = (weights.gate_F, weights.up_F) if gated else (weights.up_F, None)
    shared = (x_TD, weights.routing_FD, second, weights.down_FD, mask_TE.requires_grad_(soft))
    options = {
        **{"act": "silu", "up_act": "identity", "threshold": 0.0, "up_threshold": 0.0},
        **{"atomic": False, "config": []},
    }
    scales, off_F = [None] * 3, torch.randn(9)
    every = (*shared, *biases, weights.down_D, *scales, off_F, inputs(2, 8))
    torch.library.opcheck(forward, every, {**options, "gate_first": False})
    detached = [one if one is None else one.detach() for one in (*shared, *biases, off_F)]
    torch.library.opcheck(backward, (torch.randn(2, 8), *detached), options)


def test_packed_once_called_often() -> None:
    weights = replace(make((8, 3, 9)), down_FD=torch.randn(8, 9).T)
    packed = pack(weights, backend="triton")
    x_TD, mask_TE = torch.randn(2, 8), MASKS["random"](2, 3)
    expected_TD = sparse_ffn_reference(weights, x_TD, mask_TE)
    torch.testing.assert_close(packed(x_TD, mask_TE), expected_TD, rtol=1e-5, atol=1e-5)


def test_tune_takes_the_fastest_and_prefers_the_pinned() -> None:
    weights, x_TD = make((8, 3, 9)), torch.randn(1, 8)
    clock = iter(range(len(candidates(1)), 0, -1))

    def milliseconds(call: Callable[[], Tensor]) -> float:
        torch.testing.assert_close(call(), sparse_ffn_reference(weights, x_TD, None))
        return next(clock)

    assert tune(weights, x_TD, milliseconds=milliseconds) == candidates(1)[-1]
    assert tune(weights, x_TD, milliseconds=lambda call: 1.0) == candidates(1)[0]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"down_FD": torch.randn(8, 9).T}, {}, r"^down_FD has strides \(1, 9\): .*contiguous"),
        ({"up_FD": torch.randn(9, 8).half()}, {}, "^x_TD is torch.float32 and up_FD torch.float16"),
        ({"act": torch.tanh}, {}, "^backend 'triton' knows activations by name"),
        ({}, {"gate_first": True}, "^gate_first needs an activation that can be zero: relu, "),
        (
            {"act": "relu", "off_F": torch.randn(9)},
            {"gate_first": True},
            "^gate_first leaves out what is zero, and with off_F",
        ),
    ],
    ids=["strides", "dtypes", "function", "gate-first", "gate-first-off"],
)
def test_what_the_kernels_cannot_run_is_named(
    changes: dict[str, Any], options: dict[str, Any], message: str, default_device: torch.device
) -> None:
    here = {
        k: one.to(default_device) if isinstance(one, Tensor) else one for k, one in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        sparse_ffn_triton(replace(make((8, 3, 9)), **here), torch.randn(2, 8), **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_elsewhere_is_named(name: str) -> None:
    weights = replace(make((8, 3, 9)), **{name: getattr(make((8, 3, 9)), name).to("meta")})
    with pytest.raises(ValueError, match=rf"^x_TD is on \w+(:0)? and {name} on meta: backend"):
        sparse_ffn_triton(weights, torch.randn(2, 8))


@pytest.mark.interpreter
def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="backend 'triton' runs on a GPU and x_TD is on"):
        sparse_ffn_triton(make((8, 3, 9)), torch.randn(2, 8))


def test_without_triton_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("moe_tools.kernels.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(kernels, "_LOADED", {})
    weights = make((8, 3, 9))
    with pytest.raises(ValueError, match=r"not installed: pip install 'moe-tools\[gpu\]'$"):
        sparse_ffn(torch.randn(2, 8), weights.up_FD, weights.down_FD, act="silu", backend="triton")


def test_the_backend_is_listed_where_it_runs() -> None:
    assert ("triton" in backends()) == torch.cuda.is_available()
