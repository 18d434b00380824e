"""A native decoder layer against the same in PyTorch, in float64, rounded in the same places."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.bench.generate import threads
from moe_tools.kernels.activations import NAMES, Act
from moe_tools.kernels.cpu.decoder_layer import (
    MOST_SEQUENCES,
    MOST_SHARING,
    Attention,
    CpuDecoderLayer,
    DenseFFN,
    Norms,
    RMSNorm,
    cannot_decode,
)
from moe_tools.kernels.cpu.linear import CpuLinear
from moe_tools.kernels.cpu.native import isas
from moe_tools.kernels.cpu.rows import BITS, FLOATS
from moe_tools.kernels.few_bits import group_int8
from moe_tools.kernels.quantize import INT4

TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of the largest number: sums in fp32, or a last place of the result."""
IN_FEW_BITS = 1e-2
"""Where x is rounded to int8: a last place of it may be another one."""
CHUNK = 256
"""Positions that a thread attends to at a time."""
ROLES = ("before_attention", "behind_attention", "before_ffn", "behind_ffn")
NORMS = ("of_queries", "of_keys", *ROLES)
LAYOUTS = ("plain", "room behind", "transposed", "apart")
MASKS = ("none", "bool", "added")


# --- the slow twin --------------------------------------------------------------------------------


class Twin:
    """What `CpuDecoderLayer` computes, in float64."""

    def __init__(self, layer: CpuDecoderLayer) -> None:
        self.layer, self.dtype = layer, layer.dtype

    def new_heads(self, h_B1D: Tensor, cos_B1W: Tensor, sin_B1W: Tensor) -> tuple[Tensor, ...]:
        heads = self.layer.attention
        x_BD = normed(h_B1D[:, 0].double(), self.layer.norms.before_attention)
        q, k, v = (self.product(x_BD, one) for one in (heads.q, heads.k, heads.v))
        q, k, v = (one.view(len(h_B1D), -1, 1, heads.head) for one in (q, k, v))
        q, k = normed(q, heads.of_queries), normed(k, heads.of_keys)
        cos, sin = cos_B1W.double()[:, None], sin_B1W.double()[:, None]
        return turned(q, cos, sin), turned(k, cos, sin), v

    def new_token(
        self, h_B1D: Tensor, q_BH1W: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sizes, norms, ffn = self.layer.attention, self.layer.norms, self.layer.ffn
        sharing = sizes.query_heads // sizes.key_heads
        keys, values = (one.double().repeat_interleave(sharing, 1) for one in (keys, values))
        scores = q_BH1W.double() @ keys.transpose(2, 3) * sizes.scale
        if mask is not None:
            allowed = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, -torch.inf) if allowed else scores + mask.double()
        x_BD = (scores.softmax(-1) @ values).flatten(1)
        h_BD = h_B1D[:, 0].double() + normed(self.product(x_BD, sizes.o), norms.behind_attention)
        h_BD = self.rounded(h_BD)
        x_BD = normed(h_BD, norms.before_ffn)
        if ffn is not None:
            hidden = self.product(x_BD, ffn.up)
            hidden = (
                ffn.act(hidden)
                if ffn.gate is None
                else ffn.act(self.product(x_BD, ffn.gate)) * hidden
            )
            h_BD = h_BD + normed(self.product(hidden, ffn.down), norms.behind_ffn)
        return h_BD[:, None], x_BD[:, None]

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).double()

    def product(self, x_BD: Tensor, linear: CpuLinear) -> Tensor:
        x_BD = self.rounded(x_BD)
        if linear.dtype in BITS:
            x_BD = group_int8(x_BD.float()).double()
        y_BN = x_BD @ linear.weight_ND().double().T
        return y_BN if linear.bias_N is None else y_BN + linear.bias_N.double()


def normed(x: Tensor, norm: RMSNorm | None) -> Tensor:
    if norm is None:
        return x
    x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return x * (norm.weight_D.double() + norm.offset)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat([-other, one], -1) * sin


# --- layers and caches ----------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "isa": None,
    "dtype": torch.float32,
    "weights": torch.float32,
    "width": 24,
    "query_heads": 2,
    "key_heads": 1,
    "head": 16,
    "neurons": 20,
    "biased": True,
    "gated": True,
    "act": Act("silu"),
    "norms": NORMS,
    "offset": 0.0,
}


def make(**changes: Any) -> CpuDecoderLayer:
    """A layer of random numbers; `neurons` 0: without an FFN."""
    case = PLAIN | changes
    width, head, dtype = case["width"], case["head"], case["dtype"]
    weights = dtype if "dtype" in changes and "weights" not in changes else case["weights"]

    def linear(rows: int, columns: int) -> CpuLinear:
        bias_N = torch.randn(rows).to(dtype) if case["biased"] else None
        weight_ND = torch.randn(rows, columns) / columns**0.5
        return CpuLinear(weight_ND, bias_N, weights, isa=case["isa"])

    def norm(name: str, size: int) -> RMSNorm | None:
        weight_D = (1 - case["offset"] + torch.randn(size) / 4).to(dtype)
        return RMSNorm(weight_D, 1e-5, case["offset"]) if name in case["norms"] else None

    of_queries, of_keys = case["query_heads"] * head, case["key_heads"] * head
    attention = Attention(
        linear(of_queries, width),
        linear(of_keys, width),
        linear(of_keys, width),
        linear(width, of_queries),
        case["query_heads"],
        case["key_heads"],
        head,
        scale=1.3 * head**-0.5,
        of_queries=norm("of_queries", head),
        of_keys=norm("of_keys", head),
    )
    ffn = None
    if case["neurons"]:
        up, gate = (linear(case["neurons"], width) for _ in range(2))
        down = linear(width, case["neurons"])
        ffn = DenseFFN(up, down, case["act"], gate if case["gated"] else None)
    return CpuDecoderLayer(attention, Norms(**{r: norm(r, width) for r in ROLES}), dtype, ffn)


def positions_of(layer: CpuDecoderLayer, rows: int) -> tuple[Tensor, Tensor]:
    """cos_B1W and sin_B1W; the halves of a head differ, which a host's do not."""
    angles = 6 * torch.rand(rows, 1, layer.attention.head)
    return angles.cos().to(layer.dtype), angles.sin().to(layer.dtype)


def cache_of(layer: CpuDecoderLayer, sequences: int, positions: int, layout: str) -> Tensor:
    """Random keys or values, with infinity wherever nobody may read."""
    sizes = layer.attention
    shape = (sequences, sizes.key_heads, positions, sizes.head)
    if layout == "transposed":
        made = torch.randn(sequences, positions, sizes.key_heads, sizes.head).transpose(1, 2)
        return made.to(layer.dtype)
    if layout == "room behind":
        made = torch.full((*shape[:2], positions + 9, shape[3]), torch.inf, dtype=layer.dtype)
        made[:, :, :positions] = torch.randn(shape)
        return made[:, :, :positions]
    if layout == "apart":
        made = torch.full((*shape[:3], sizes.head + 7), torch.inf, dtype=layer.dtype)
        made[..., 5 : sizes.head + 5] = torch.randn(shape)
        return made[..., 5 : sizes.head + 5]
    return torch.randn(shape).to(layer.dtype)


def mask_of(kind: str, rows: int, positions: int, dtype: torch.dtype) -> Tensor | None:
    """Half of the positions, the last one always; as in a padded batch, whole chunks are off."""
    on = torch.rand(rows, 1, 1, positions) < 0.5
    if positions > CHUNK:
        on[..., :CHUNK] &= torch.rand(rows, 1, 1, 1) < 0.5
    on[..., -1] = True
    if kind == "none":
        return None
    if kind == "bool":
        return on
    added = torch.randn(on.shape)
    return added.masked_fill(~on, torch.finfo(dtype).min).to(dtype)


def run(
    layer: CpuDecoderLayer | Twin, given: dict[str, Any]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    heads = layer.new_heads(given["h"], *given["embedded"])
    token = layer.new_token(given["h"], given["q"], given["keys"], given["values"], given["mask"])
    return heads, token


def written(layer: CpuDecoderLayer, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """Heads and h of a layer with an FFN, which leaves x as it is."""
    heads, (out_B1D, _) = run(layer, given)
    return (*heads, out_B1D)


def inputs_of(
    layer: CpuDecoderLayer,
    sequences: int = 2,
    positions: int = 5,
    *,
    layouts: tuple[str, str] = ("plain", "plain"),
    mask: str = "none",
    mask_dtype: torch.dtype | None = None,
    shared: bool = False,
) -> dict[str, Any]:
    """What a call takes; `shared`: one position and one mask for all sequences."""
    rows, sizes = 1 if shared else sequences, layer.attention
    return {
        "h": torch.randn(sequences, 1, layer.width).to(layer.dtype),
        "embedded": positions_of(layer, rows),
        "q": torch.randn(sequences, sizes.query_heads, 1, sizes.head).to(layer.dtype),
        "keys": cache_of(layer, sequences, positions, layouts[0]),
        "values": cache_of(layer, sequences, positions, layouts[1]),
        "mask": mask_of(mask, rows, positions, mask_dtype or layer.dtype),
    }


def check(layer: CpuDecoderLayer, given: dict[str, Any]) -> None:
    heads, (out_B1D, x_B1D) = run(layer, given)
    expected_heads, (expected_out_B1D, expected_x_B1D) = run(Twin(layer), given)
    few = any(linear.dtype in BITS for linear in layer.linears())
    tolerance = max(TOLERANCES[layer.dtype], IN_FEW_BITS if few else 0.0)
    pairs = [*zip(heads, expected_heads, strict=True), (out_B1D, expected_out_B1D)]
    if layer.ffn is None:
        pairs.append((x_B1D, expected_x_B1D))
    for one, other in pairs:
        assert one.shape == other.shape and one.dtype == layer.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()


# --- numbers --------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    dtype = draw(st.sampled_from(FLOATS))
    query_heads, key_heads = draw(st.sampled_from([(1, 1), (2, 2), (3, 1), (9, 3)]))
    name = draw(st.sampled_from(NAMES))
    layer = {
        "isa": draw(st.sampled_from(isas())),
        "dtype": dtype,
        "weights": draw(st.sampled_from([dtype, dtype, torch.bfloat16, torch.int8, INT4])),
        "width": draw(st.integers(1, 70) | st.sampled_from([256, 257, 600])),
        "query_heads": query_heads,
        "key_heads": key_heads,
        "head": draw(st.integers(1, 3)) * 64 // dtype.itemsize,
        "neurons": draw(st.just(0) | st.integers(1, 70) | st.sampled_from([130, 500])),
        "biased": draw(st.booleans()),
        "gated": draw(st.booleans()),
        "act": Act(name, 0.1 if name in ("fatrelu", "shifted_relu") else 0.0),
        "norms": draw(st.sets(st.sampled_from(NORMS))),
        "offset": draw(st.sampled_from([0.0, 1.0])),
    }
    inputs = {
        "sequences": draw(st.sampled_from([1, 2, 3, MOST_SEQUENCES])),
        "positions": draw(st.sampled_from([1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 700])),
        "layouts": (draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        "mask": draw(st.sampled_from(MASKS)),
        "mask_dtype": draw(st.sampled_from([dtype, torch.float32])),
        "shared": draw(st.booleans()),
    }
    others = {"threads": draw(st.integers(1, 3)), "seed": draw(st.integers(0, 2**16))}
    return {"layer": layer, "inputs": inputs} | others


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(cases())
def test_a_layer_computes_what_pytorch_computes(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    layer = make(**case["layer"])
    with threads(case["threads"]):
        check(layer, inputs_of(layer, **case["inputs"]))


@pytest.mark.parametrize("weights", [torch.float32, torch.int8, INT4], ids=str)
@pytest.mark.parametrize("isa", isas())
def test_so_it_does_on_every_instruction_set(isa: str, weights: torch.dtype) -> None:
    for dtype in FLOATS:
        own = dtype if weights == torch.float32 else weights
        layer = make(isa=isa, dtype=dtype, weights=own, head=64)
        check(layer, inputs_of(layer, 3, CHUNK + 1, mask="bool"))


def test_as_many_heads_as_may_share_one_of_keys() -> None:
    layer = make(query_heads=MOST_SHARING)
    check(layer, inputs_of(layer, 2, CHUNK + 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation(name: Any, gated: bool) -> None:
    threshold = 0.1 if name in ("fatrelu", "shifted_relu") else 0.0
    layer = make(act=Act(name, threshold), gated=gated, neurons=130)
    check(layer, inputs_of(layer))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.int8], ids=str)
def test_neither_threads_nor_time_change_a_bit(weights: torch.dtype) -> None:
    layer = make(
        dtype=torch.bfloat16, weights=weights, width=520, head=64, query_heads=6, neurons=900
    )
    given = inputs_of(layer, 3, 700, mask="bool")
    with threads(1):
        expected = written(layer, given)
    for count in (1, 2, 5):
        with threads(count):
            for _ in range(5):
                assert all(map(torch.equal, written(layer, given), expected))


def test_sequences_do_not_depend_on_each_other() -> None:
    """Bit by bit, so that a batch gives the texts of its rows."""
    layer = make(neurons=70)
    given = inputs_of(layer, 3, CHUNK + 1, mask="bool")
    expected = written(layer, given)
    for row in range(3):
        part = slice(row, row + 1)
        one = {name: value[part] for name, value in given.items() if name != "embedded"}
        one["embedded"] = tuple(half[part].contiguous() for half in given["embedded"])
        for whole, alone in zip(expected, written(layer, one), strict=True):
            assert torch.equal(whole[part], alone)


def test_a_change_of_a_norm_is_followed() -> None:
    layer = make()
    given = inputs_of(layer)
    before = run(layer, given)[1][0]
    norm = layer.norms.before_ffn
    assert norm is not None
    norm.weight_D.mul_(2)
    assert not torch.equal(run(layer, given)[1][0], before)
    check(layer, given)


def test_a_layer_keeps_what_its_kernels_read() -> None:
    def given_away() -> CpuDecoderLayer:
        made = make(width=200)
        return CpuDecoderLayer(made.attention, made.norms, made.dtype, made.ffn)

    layer = given_away()
    given = inputs_of(layer)
    before = run(layer, given)
    gc.collect()
    _ = [torch.full((200, 200), torch.nan) for _ in range(50)]
    assert torch.equal(run(layer, given)[1][0], before[1][0])
    check(layer, given)


# --- infinite numbers, and those that nobody may see ----------------------------------------------


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
@pytest.mark.parametrize("norms", [NORMS, ()])
@pytest.mark.parametrize("weights", [torch.float32, torch.int8], ids=str)
def test_what_is_not_finite_stays_in_its_sequence(
    number: float, norms: Any, weights: torch.dtype
) -> None:
    layer = make(norms=norms, weights=weights, act=Act("relu"))
    given = inputs_of(layer, 3)
    given["h"][1, 0, 5] = number
    heads, (out_B1D, _) = run(layer, given)
    for part in (*heads, out_B1D):
        assert part[0].isfinite().all() and part[2].isfinite().all()
    assert not any(part[1].isfinite().any() for part in heads)
    assert not out_B1D[1].isfinite().all()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_the_key_of_a_masked_position_is_nothing(isa: str, number: float) -> None:
    layer = make(isa=isa)
    for mask in ("bool", "added"):
        given = inputs_of(layer, 2, CHUNK + 2, mask=mask)
        never = False if mask == "bool" else -torch.inf
        given["mask"][..., 3] = given["mask"][..., CHUNK] = never
        expected = run(layer, given)[1][0]
        given["keys"][:, :, 3] = given["keys"][:, :, CHUNK] = number
        assert torch.equal(run(layer, given)[1][0], expected)


@pytest.mark.parametrize("position", [0, CHUNK - 1, CHUNK])
def test_the_key_of_another_one_is_not(position: int) -> None:
    """Also where it is alone in what a thread attends to."""
    layer = make()
    given = inputs_of(layer, 2, CHUNK + 1)
    given["keys"][1, 0, position, 3] = torch.nan
    out_B1D = run(layer, given)[1][0]
    assert out_B1D[0].isfinite().all() and not out_B1D[1].isfinite().any()


def test_where_nothing_is_allowed_nothing_is_attended_to() -> None:
    """As PyTorch's attention has it."""
    layer = make(biased=False, neurons=0)
    given = inputs_of(layer, 2, CHUNK + 1, mask="bool")
    given["mask"][1] = False
    out_B1D = run(layer, given)[1][0]
    q, keys, values = given["q"], given["keys"], given["values"]
    sharing = layer.attention.query_heads
    attended = torch.nn.functional.scaled_dot_product_attention(
        q, keys.repeat_interleave(sharing, 1), values.repeat_interleave(sharing, 1), given["mask"]
    )
    assert attended[1].eq(0).all()
    assert torch.equal(out_B1D[1], given["h"][1])


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [
        (torch.float64, {}, r"^torch\.float64 is none of fp32, bf16 and fp16$"),
        (torch.float32, {"head": 8}, r"^a head of 8 numbers in torch\.float32 fills no whole"),
        (torch.bfloat16, {"head": 16}, r"^a head of 16 numbers in torch\.bfloat16 fills no whole"),
        (torch.float32, {"query_heads": 3, "key_heads": 2}, "^3 heads do not share 2$"),
        (torch.float32, {"query_heads": 65}, "^more than 64 heads share one of keys$"),
    ],
)
def test_what_the_kernels_do_not_know_is_refused(
    dtype: torch.dtype, changes: dict[str, Any], message: str
) -> None:
    made = make()
    attention = replace(made.attention, **changes)
    assert cannot_decode(torch.float32, made.attention) is None
    assert cannot_decode(dtype, attention) is not None
    with pytest.raises(ValueError, match=message):
        CpuDecoderLayer(attention, made.norms, dtype)


def test_gate_and_up_of_several_formats_are_refused() -> None:
    made, other = make(), make(weights=torch.int8)
    assert made.ffn is not None and other.ffn is not None
    ffn = replace(made.ffn, gate=other.ffn.gate)
    with pytest.raises(ValueError, match=r"^the gate is stored in torch\.int8, up in torch\.float"):
        CpuDecoderLayer(made.attention, made.norms, made.dtype, ffn)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"o": CpuLinear(torch.randn(24, 16), None, torch.float32)},
            r"^o is 24 x 16, the rest wan",
        ),
        (
            {"v": CpuLinear(torch.randn(32, 24), None, torch.float32)},
            r"^v is 32 x 24, the rest wan",
        ),
        ({"query_heads": 3}, r"^q is 32 x 24, the rest wants 48 x 24$"),
        ({"of_keys": RMSNorm(torch.ones(24), 1e-5)}, r"^the norm of_keys is no row of 16 numbers"),
        (
            {"of_keys": RMSNorm(torch.ones(32)[::2], 1e-5)},
            r"^the norm of_keys is no row of 16 numb",
        ),
        ({"of_queries": RMSNorm(torch.ones(16).half(), 1e-5)}, r"16 numbers in torch.float32$"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    """The kernels would read or write beside it."""
    made = make()
    with pytest.raises(ValueError, match=message):
        CpuDecoderLayer(replace(made.attention, **changes), made.norms, made.dtype)


def test_so_is_an_ffn_or_a_norm_of_another_width() -> None:
    made, other = make(), make(width=25)
    with pytest.raises(ValueError, match=r"^up is 20 x 25, the rest wants 20 x 24$"):
        CpuDecoderLayer(made.attention, made.norms, made.dtype, other.ffn)
    with pytest.raises(ValueError, match=r"^the norm before_attention is no row of 24 numbers"):
        CpuDecoderLayer(made.attention, other.norms, made.dtype)


@pytest.mark.parametrize("call", ["new_heads", "new_token"])
def test_wrong_arguments_are_named(call: str) -> None:
    layer = make()
    function: Callable[..., None] = getattr(layer._native, call)
    with pytest.raises(TypeError, match=r"^give the layer, then names$"):
        function(threads=1)
    with pytest.raises(TypeError, match=r"^sequences is missing$"):
        function(layer.handle, threads=1)
    with pytest.raises(ValueError, match=r"incorrect name|invalid PyCapsule"):
        function(layer.attention.q.handle, threads=1)
