"""`sparse_ffn` against a loop over tokens and experts that shares no code with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_tools.kernels.sparse_ffn import backends, pack, sparse_ffn
from moe_tools.kernels.weights import FFNWeights

ON_CPU = [name for name in backends() if name != "triton"]
"""Backends for tensors on a CPU, whatever GPU is here; tests/kernels/triton has its own."""
ACTS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}
# (leading dimensions, D, E, F)
SHAPES = [
    ((1,), 1, 1, 1),
    ((7,), 5, 3, 12),
    ((7,), 5, 3, 13),
    ((3,), 13, 7, 7),
    ((3,), 13, 7, 10),
    ((17,), 3, 1, 9),
    ((2, 3), 4, 2, 6),
    ((2, 3), 4, 2, 7),
    ((2, 1, 3), 2, 5, 10),
    ((2, 1, 3), 2, 5, 9),
    ((), 6, 3, 6),
    ((), 6, 3, 8),
    ((0,), 4, 3, 6),
    ((0,), 4, 3, 7),
]
MASKS: dict[str, Callable[..., Tensor]] = {
    "random": lambda *shape: torch.rand(shape) < 0.5,
    "empty": lambda *shape: torch.zeros(shape, dtype=torch.bool),
    "full": lambda *shape: torch.ones(shape, dtype=torch.bool),
    "soft": lambda *shape: torch.rand(shape, dtype=torch.float64, requires_grad=True),
}
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_mask = pytest.mark.parametrize("mask", MASKS)
gated_or_not = pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])


def expert_by_expert(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    mask_TE: Tensor,
    *,
    gate_FD: Tensor | None,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """y = sum over the experts that are on of weight * E(x), a token and a neuron at a time."""
    experts = mask_TE.shape[-1]
    size, longer = divmod(len(up_FD), experts)
    rows = []
    for x_D, mask_E in zip(
        x_TD.reshape(-1, x_TD.shape[-1]), mask_TE.reshape(-1, experts), strict=True
    ):
        y_D = x_D * 0
        stop = 0
        for expert in range(experts):
            start, stop = stop, stop + size + (expert < longer)
            if mask_E[expert] == 0:
                continue
            for neuron in range(start, stop):
                h = torch.dot(up_FD[neuron], x_D)
                h = act(h) if gate_FD is None else act(torch.dot(gate_FD[neuron], x_D)) * h
                y_D = y_D + mask_E[expert] * h * down_FD[neuron]
        rows.append(y_D)
    return torch.stack(rows).view(x_TD.shape) if rows else x_TD * up_FD.sum() * down_FD.sum() * 0


def make(shape: tuple[Any, ...], gated: bool, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Random tensor arguments that want gradients."""
    leading, width, _, neurons = shape
    sizes = {"x_TD": (*leading, width)}
    sizes |= {name: (neurons, width) for name in ("up_FD", "down_FD", "gate_FD")}
    tensors = {name: torch.randn(s, dtype=dtype, requires_grad=True) for name, s in sizes.items()}
    return tensors if gated else tensors | {"gate_FD": None}


@every_shape
@every_mask
@gated_or_not
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_output_and_every_gradient_equal_the_loop(
    shape: tuple[Any, ...], mask: str, gated: bool, backend: str
) -> None:
    arguments = make(shape, gated)
    mask_TE = MASKS[mask](*shape[0], shape[2])
    act = ACTS["silu"]
    expected_TD = expert_by_expert(**arguments, mask_TE=mask_TE, act=act)
    y_TD = sparse_ffn(**arguments, mask_TE=mask_TE, act=act, backend=backend)
    assert y_TD.shape == arguments["x_TD"].shape
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-12, atol=1e-12)
    wanted = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    if mask_TE.requires_grad:
        wanted["mask_TE"] = mask_TE
    direction_TD = torch.randn_like(y_TD)
    options = {"allow_unused": True, "materialize_grads": True}
    actual = torch.autograd.grad(y_TD, list(wanted.values()), direction_TD, **options)
    expected = torch.autograd.grad(expected_TD, list(wanted.values()), direction_TD, **options)
    for name, ours, theirs in zip(wanted, actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("act", ACTS)
@gated_or_not
def test_any_activation_will_do(act: str, gated: bool) -> None:
    arguments = make(((5,), 4, 3, 7), gated)
    mask_TE = torch.rand(5, 3) < 0.5
    expected_TD = expert_by_expert(**arguments, mask_TE=mask_TE, act=ACTS[act])
    y_TD = sparse_ffn(**arguments, mask_TE=mask_TE, act=ACTS[act])
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-12, atol=1e-12)


@gated_or_not
def test_gradients_agree_with_finite_differences(gated: bool) -> None:
    arguments = make(((3,), 4, 3, 7), gated)
    mask_TE = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)

    def function(mask_TE: Tensor, *tensors: Tensor) -> Tensor:
        names = [name for name, tensor in arguments.items() if tensor is not None]
        return sparse_ffn(mask_TE=mask_TE, **dict(zip(names, tensors, strict=True)), act=torch.tanh)

    tensors = [tensor for tensor in arguments.values() if tensor is not None]
    assert torch.autograd.gradcheck(function, (mask_TE, *tensors))


@gated_or_not
def test_experts_that_are_off_get_no_gradient(gated: bool) -> None:
    arguments = make(((5,), 4, 3, 7), gated)
    mask_TE = torch.tensor([True, False, True]).expand(5, 3)
    sparse_ffn(**arguments, mask_TE=mask_TE, act=F.silu).sum().backward()
    for name in ("up_FD", "down_FD") + ("gate_FD",) * gated:
        used = arguments[name].grad.ne(0).any(dim=1)
        assert used.tolist() == [True, True, True, False, False, True, True], name


def test_a_full_mask_is_the_dense_ffn() -> None:
    arguments = make(((5,), 4, 3, 7), True, torch.float32)
    x, up, down, gate = (arguments[name] for name in ("x_TD", "up_FD", "down_FD", "gate_FD"))
    y_TD = sparse_ffn(**arguments, mask_TE=torch.ones(5, 3, dtype=torch.bool), act=F.silu)
    expected_TD = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down.T)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-6, atol=1e-6)


def test_an_empty_mask_is_zero() -> None:
    arguments = make(((5,), 4, 3, 7), True)
    y_TD = sparse_ffn(**arguments, mask_TE=torch.zeros(5, 3, dtype=torch.bool), act=F.silu)
    assert not y_TD.any()


def test_a_boolean_mask_is_a_soft_mask_of_ones_and_zeros() -> None:
    arguments = make(((5,), 4, 3, 7), True)
    mask_TE = torch.rand(5, 3) < 0.5
    hard_TD, soft_TD = (
        sparse_ffn(**arguments, mask_TE=mask, act=F.silu) for mask in (mask_TE, mask_TE.double())
    )
    assert torch.equal(hard_TD, soft_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    arguments = make(((5,), 4, 3, 7), True, dtype)
    y_TD = sparse_ffn(**arguments, mask_TE=torch.rand(5, 3), act=F.silu)
    assert y_TD.dtype == dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_FD": (5, 4)}, r"^down_FD is \(5, 4\); up_FD is \(6, 4\)$"),
        ({"gate_FD": (6, 3)}, r"^gate_FD is \(6, 3\); up_FD is \(6, 4\)$"),
        ({"up_FD": (6,)}, r"^up_FD is \(6,\); weights are \(neurons, width\)$"),
        ({"up_FD": (0, 4)}, r"^up_FD is \(0, 4\); weights are \(neurons, width\)$"),
        ({"up_FD": (2, 6, 4)}, r"^up_FD is \(2, 6, 4\); weights are \(neurons, width\)$"),
        ({"x_TD": (5, 3)}, r"^x_TD is \(5, 3\); the weights have width 4$"),
        ({"x_TD": ()}, r"^x_TD is \(\); the weights have width 4$"),
        ({"mask_TE": (4, 3)}, r"^mask_TE is \(4, 3\); x_TD is \(5, 4\)$"),
        ({"mask_TE": (3,)}, r"^mask_TE is \(3,\); x_TD is \(5, 4\)$"),
        ({"x_TD": (4,), "mask_TE": ()}, r"^mask_TE is \(\); x_TD is \(4,\)$"),
        ({"mask_TE": (5, 7)}, "^6 neurons cannot make 7 experts$"),
        ({"mask_TE": (5, 0)}, "^6 neurons cannot make 0 experts$"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_shapes_that_do_not_fit_are_named(
    changes: dict[str, tuple[int, ...]], message: str
) -> None:
    sizes = {
        "x_TD": (5, 4),
        "up_FD": (6, 4),
        "down_FD": (6, 4),
        "gate_FD": (6, 4),
        "mask_TE": (5, 3),
    }
    tensors = {name: torch.zeros(size) for name, size in (sizes | changes).items()}
    with pytest.raises(ValueError, match=message):
        sparse_ffn(**tensors, act=F.silu)


def test_an_unknown_backend_is_named() -> None:
    arguments = make(((5,), 4, 3, 7), True)
    with pytest.raises(
        ValueError, match=r"^unknown backend 'triten'; known: auto, cpu, triton, reference$"
    ):
        sparse_ffn(**arguments, mask_TE=torch.ones(5, 3), act=F.silu, backend="triten")


def test_biases_belong_to_their_neurons_and_the_output() -> None:
    arguments = make(((5,), 4, 3, 7), True)
    x, up, down, gate = (arguments[name] for name in ("x_TD", "up_FD", "down_FD", "gate_FD"))
    up_F, gate_F, down_D = (torch.randn(n, dtype=torch.float64) for n in (7, 7, 4))
    mask_TE = torch.rand(5, 3) < 0.5
    y_TD = sparse_ffn(
        **arguments, mask_TE=mask_TE, act="silu", up_F=up_F, gate_F=gate_F, down_D=down_D
    )
    h_TF = F.silu(x @ gate.T + gate_F) * (x @ up.T + up_F)
    mask_TF = torch.cat([mask_TE[:, :1].expand(5, 3), mask_TE[:, 1:].repeat_interleave(2, 1)], 1)
    torch.testing.assert_close(y_TD, (h_TF * mask_TF) @ down + down_D, rtol=1e-12, atol=1e-12)


def test_an_activation_of_up_makes_drelu() -> None:
    arguments = make(((5,), 4, 3, 7), True)
    x, up, down, gate = (arguments[name] for name in ("x_TD", "up_FD", "down_FD", "gate_FD"))
    y_TD = sparse_ffn(**arguments, act="relu", up_act="relu")
    expected_TD = (F.relu(x @ gate.T) * F.relu(x @ up.T)) @ down
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-12, atol=1e-12)


@every_shape
@pytest.mark.parametrize("mask", ["random", "empty", "full"])
@gated_or_not
@pytest.mark.parametrize("backend", ON_CPU)
def test_every_backend_equals_the_loop(
    shape: tuple[Any, ...], mask: str, gated: bool, backend: Any
) -> None:
    arguments = make(shape, gated, torch.float32)
    mask_TE = MASKS[mask](*shape[0], shape[2])
    expected_TD = expert_by_expert(**arguments, mask_TE=mask_TE, act=ACTS["silu"])
    arguments = {name: None if t is None else t.detach() for name, t in arguments.items()}
    y_TD = sparse_ffn(**arguments, mask_TE=mask_TE, act="silu", backend=backend)
    torch.testing.assert_close(y_TD, expected_TD.detach(), rtol=1e-4, atol=1e-4)
    x_TD = arguments.pop("x_TD")
    packed = pack(FFNWeights(**arguments, act="silu"), backend=backend)
    assert packed.backend == backend
    torch.testing.assert_close(packed(x_TD, mask_TE), y_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_packed_weights_are_stored_as_asked(backend: Any, dtype: torch.dtype) -> None:
    arguments = make(((2,), 40, 3, 50), True, torch.float32)
    x_TD, up, down, gate = (arguments[n].detach() for n in ("x_TD", "up_FD", "down_FD", "gate_FD"))
    x_TD = x_TD if dtype == torch.int8 else x_TD.to(dtype)
    y_TD = pack(FFNWeights(up, down, "relu", gate), dtype=dtype, backend=backend)(x_TD)
    expected_TD = sparse_ffn(x_TD.float(), up, down, gate_FD=gate, act="relu")
    error = (y_TD.float() - expected_TD).norm() / expected_TD.norm()
    limit = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 3e-3, torch.int8: 0.03}
    assert error < limit[dtype]
    assert (error > 1e-5) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_reference_takes_tokens_of_any_dtype(dtype: torch.dtype) -> None:
    weights = FFNWeights(torch.randn(6, 4), torch.randn(6, 4), "silu")
    x_TD = torch.randn(3, 4).to(dtype)
    y_TD = pack(weights, dtype=torch.bfloat16, backend="reference")(x_TD)
    assert y_TD.dtype == dtype
    expected_TD = sparse_ffn(x_TD.float(), weights.up_FD, weights.down_FD, act="silu")
    torch.testing.assert_close(y_TD.float(), expected_TD, rtol=0.05, atol=0.05)


@pytest.mark.skipif("cpu" not in backends(), reason="test_native.py says so")
@pytest.mark.parametrize("tokens", [1, 8, 40])  # the kernels, either, matrix products
def test_a_sole_copy_computes_the_same_and_frees_the_weights(tokens: int) -> None:
    up_FD, down_FD, gate_FD = torch.randn(3, 50, 24)
    x_TD, mask_TE = torch.randn(tokens, 24), torch.rand(tokens, 7) < 0.5
    matrices = [up_FD.clone(), down_FD.clone(), gate_FD.clone()]
    freed = [weakref.ref(matrix) for matrix in matrices]
    packed = pack(FFNWeights(matrices[0], matrices[1], "silu", matrices[2]), sole=True)
    held = pack(FFNWeights(up_FD, down_FD, "silu", gate_FD))
    y_TD = packed(x_TD, mask_TE)
    matrices.clear()
    assert [matrix() for matrix in freed] == [None] * 3
    torch.testing.assert_close(packed(x_TD, mask_TE), y_TD, rtol=0, atol=0)
    torch.testing.assert_close(y_TD, held(x_TD, mask_TE), rtol=1e-5, atol=1e-5)


def test_what_no_kernel_knows_is_left_to_the_reference() -> None:
    up, down = torch.randn(6, 4), torch.randn(6, 4)
    assert pack(FFNWeights(up, down, torch.tanh)).backend == "reference"
    assert pack(FFNWeights(up.double(), down.double(), "silu")).backend == "reference"


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_packed_ffn_refuses_gradients_and_shapes_that_do_not_fit(backend: Any) -> None:
    packed = pack(FFNWeights(torch.randn(6, 4), torch.randn(6, 4), "silu"), backend=backend)
    x_TD = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"^a packed FFN has no gradients: call it under"):
        packed(x_TD)
    with torch.no_grad():
        assert not packed(x_TD).requires_grad
    with pytest.raises(ValueError, match=r"^x_TD is \(2, 5\); the weights have width 4$"):
        packed(torch.randn(2, 5))


@pytest.mark.skipif("cpu" not in backends(), reason="test_native.py says so")
@pytest.mark.parametrize("name", ["x_TD", "up_FD", "down_FD", "gate_FD"])
def test_the_native_backend_drops_no_gradient_silently(name: str) -> None:
    arguments = make(((5,), 4, 3, 7), True, torch.float32)
    arguments = {n: t.detach().requires_grad_(n == name) for n, t in arguments.items()}
    with pytest.raises(ValueError, match="no gradients"):
        sparse_ffn(**arguments, act="silu", backend="cpu")
    with torch.no_grad():
        y_TD = sparse_ffn(**arguments, act="silu", backend="cpu")
    expected_TD = sparse_ffn(**arguments, act="silu")
    torch.testing.assert_close(y_TD, expected_TD.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"up_F": 5}, r"^up_F is \(5,\); this bias has 6 numbers$"),
        ({"gate_F": 4}, r"^gate_F is \(4,\); this bias has 6 numbers$"),
        ({"down_D": 6}, r"^down_D is \(6,\); this bias has 4 numbers$"),
        ({"gate_F": 6}, r"^gate_F and up_act belong to an FFN with a gate: give gate_FD$"),
        ({"up_act": "relu"}, r"^gate_F and up_act belong to an FFN with a gate: give gate_FD$"),
    ],
    ids=["up_F", "gate_F", "down_D", "no gate", "up_act"],
)
def test_biases_that_do_not_fit_are_named(arguments: dict[str, Any], message: str) -> None:
    given = {n: torch.zeros(v) if isinstance(v, int) else v for n, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        sparse_ffn(torch.zeros(1, 4), torch.zeros(6, 4), torch.zeros(6, 4), act="relu", **given)
