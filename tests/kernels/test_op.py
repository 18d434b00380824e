"""A packed FFN under torch.compile, pickle and deepcopy."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moe_tools.kernels.activations import Act
from moe_tools.kernels.cpu.memory import HUGE_PAGE, LINE
from moe_tools.kernels.cpu.native import isas
from moe_tools.kernels.cpu.op import operands, sparse_ffn_cpu
from moe_tools.kernels.cpu.packed import CpuFFN
from moe_tools.kernels.cpu.rows import DTYPES, FLOATS
from moe_tools.kernels.weights import FFNWeights

# What the operands depend on: gates, biases, activations with a threshold, a screen.
KINDS: dict[str, dict[str, Any]] = {
    "gated": {"act": "silu"},
    "drelu": {"act": "relu", "up_act": "relu"},
    "biased": {"act": Act("fatrelu", 0.3), "biases": ("up_F", "gate_F", "off_F", "down_D")},
    "plain": {"act": "gelu_tanh", "gated": False, "biases": ("up_F",)},
    "screened": {"act": Act("shifted_relu", 0.1), "screen": 4.0},
}
every_kind = pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (kind, dtype)
        for kind in KINDS
        for dtype in (FLOATS if kind == "screened" else DTYPES)  # a screen is itself in eight bits
    ],
    ids=str,
)


def pack(
    dtype: torch.dtype = torch.float32,
    *,
    act: Any = "silu",
    gated: bool = True,
    biases: tuple[str, ...] = (),
    up_act: Any = "identity",
    neurons: int = 60,
    width: int = 40,
    **options: Any,
) -> CpuFFN:
    up_FD, down_FD, gate_FD = torch.randn(3, neurons, width) / width**0.5
    sizes = dict.fromkeys(("up_F", "gate_F", "off_F"), neurons) | {"down_D": width}
    tensors = {name: torch.randn(sizes[name]) for name in biases}
    weights = FFNWeights(up_FD, down_FD, act, gate_FD if gated else None, up_act=up_act, **tensors)
    return CpuFFN(weights, dtype, **options)


def masks(tokens: int) -> dict[str, Tensor | None]:
    return {
        "none": None,
        "experts": torch.rand(tokens, 7) < 0.5,
        "soft": torch.rand(tokens, 7),
    }


def compiled(packed: CpuFFN) -> Callable[..., Tensor]:
    def call(x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
        return packed(x_TD * 2.0, mask_TE) + 1.0

    torch.compiler.reset()
    return torch.compile(call, fullgraph=True, backend="aot_eager")


@every_kind
@pytest.mark.parametrize("tokens", [1, 20])
def test_compiled_without_a_break_it_computes_the_same(
    kind: str, dtype: torch.dtype, tokens: int
) -> None:
    packed, x_TD = pack(dtype, sole=True, **KINDS[kind]), torch.randn(tokens, 40)
    fast = compiled(packed)
    for mask_TE in masks(tokens).values():
        assert torch.equal(fast(x_TD, mask_TE), packed(x_TD * 2.0, mask_TE) + 1.0)


def test_one_graph_serves_any_number_of_tokens() -> None:
    packed = pack(sole=True)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    fast = torch.compile(packed, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (2, 3, 17, 300):
        x_TD = torch.randn(tokens, 40)
        assert torch.equal(fast(x_TD), packed(x_TD))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_so_it_is_by_inductor() -> None:
    packed, x_TD = pack(sole=True), torch.randn(3, 40)
    torch.compiler.reset()
    fast = torch.compile(lambda x_TD: packed(x_TD.relu()).relu(), fullgraph=True)
    assert torch.equal(fast(x_TD), packed(x_TD.relu()).relu())


def test_what_does_not_fit_is_refused_while_compiling() -> None:
    packed = pack(or_dense=False)
    with pytest.raises(Exception, match="the weights have width 40"):
        compiled(packed)(torch.randn(2, 30), None)
    with pytest.raises(Exception, match="give a boolean mask_TE"):
        compiled(packed)(torch.randn(2, 40), torch.rand(2, 7))


@every_kind
def test_the_operator_keeps_the_rules_of_pytorch(kind: str, dtype: torch.dtype) -> None:
    packed = pack(dtype, sole=True, **KINDS[kind])
    for x_TD in (torch.randn(2, 40), torch.randn(2, 3, 40).transpose(0, 1)):
        mask_TE = torch.rand(*x_TD.shape[:-1], 7) < 0.5
        for mask in (None, mask_TE):
            torch.library.opcheck(sparse_ffn_cpu, (x_TD, mask), operands(packed._kernel.stored))


def test_eager_calls_do_not_go_through_the_operator() -> None:
    """It costs tens of microseconds a call, more than the kernels of a small FFN."""
    packed = pack()
    with torch.profiler.profile() as profile:
        packed(torch.randn(1, 40))
    assert not [e.key for e in profile.key_averages() if "sparse_ffn_cpu" in e.key]


# --- copies ---------------------------------------------------------------------------------------


def by_pickle(packed: CpuFFN) -> CpuFFN:
    return pickle.loads(pickle.dumps(packed))


def by_torch(packed: CpuFFN) -> CpuFFN:
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_kind
@pytest.mark.parametrize("way", [by_pickle, by_torch])
def test_a_pickled_ffn_is_the_same_bit_by_bit(
    kind: str, dtype: torch.dtype, way: Callable[[CpuFFN], CpuFFN]
) -> None:
    packed = pack(dtype, **KINDS[kind])
    loaded = way(packed)
    for tokens in (1, 20):
        x_TD = torch.randn(tokens, 40)
        for mask_TE in masks(tokens).values():
            assert torch.equal(loaded(x_TD, mask_TE), packed(x_TD, mask_TE))
    for name in ("up_FD", "down_FD", "up_F", "down_D", "off_F"):
        mine, theirs = getattr(packed.weights, name), getattr(loaded.weights, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.is_meta or torch.equal(mine, theirs)


def test_a_pickled_ffn_reads_from_whole_cache_lines_and_pages() -> None:
    """An address is no part of a pickle; the kernels are slower where rows begin in between."""
    for neurons, unit in ((60, LINE), (5000, HUGE_PAGE)):
        packed = pack(neurons=neurons, width=200, screen=4.0, act="relu")
        stored = by_pickle(packed)._kernel.stored
        for tensor in (stored.rows.bytes_FPB, stored.screen.rows_FB):
            assert tensor.data_ptr() % (unit if tensor.numel() >= unit else LINE) == 0


def test_a_pickle_is_as_large_as_what_is_stored() -> None:
    packed = pack(neurons=64, width=64, sole=True)
    assert len(pickle.dumps(packed)) < 64 * 64 * 4 * 3 + 1500


def test_a_pickle_finds_the_fastest_instruction_set_of_the_cpu_that_loads_it() -> None:
    made, named = pickle.dumps(pack()), pickle.dumps(pack(isa=isas()[-1]))
    with patch("moe_tools.kernels.cpu.native._places", lambda: {"portable": 0}):
        assert pickle.loads(made)(torch.randn(1, 40)).isfinite().all()
        if len(isas()) > 1:
            with pytest.raises(ValueError, match=r"^unknown instruction set .*; this CPU runs: po"):
                pickle.loads(named)


def test_a_deep_copy_is_the_ffn_itself() -> None:
    packed = pack()
    assert copy.deepcopy(packed) is packed
    assert copy.deepcopy([packed])[0] is packed
