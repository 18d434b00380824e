"""`CpuDecoderLayer`: a decoder layer for one new token a sequence, around its key-value cache.

PyTorch spends a few dozen small operations on what stands between the products of a layer: norms,
rotary positions, attention to the cache, sums. For one token these take longer than the products of
a small model. Here they are done in the two native calls that make the products.

Letters: B sequences, D width, H heads of queries, K heads of keys and values, W numbers of a head,
S positions in the cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_tools.kernels.activations import Act
from moe_tools.kernels.cpu.linear import CpuLinear
from moe_tools.kernels.cpu.memory import LINE
from moe_tools.kernels.cpu.native import address, extension
from moe_tools.kernels.cpu.proposal import CpuProposal
from moe_tools.kernels.cpu.router import CpuRouter
from moe_tools.kernels.cpu.rows import DTYPES, FLOATS
from moe_tools.kernels.cpu.stored import Kernel

MOST_SEQUENCES = 16
"""More tokens than that, attention to long caches is better made by matrix products."""
MOST_SHARING = 64
"""Heads of queries to one of keys that the kernels know."""

_NONE, _ALLOWED, _ADDED = 0, 1, 2  # kinds of masks, as in csrc/decoder_layer.h
_NO_MASK = {"mask": _NONE, "mask_dtype": 0, "mask_BS": 0, "mask_sequence": 0}


@dataclass(frozen=True)
class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), over the last dimension (arXiv 1910.07467)."""

    weight_D: Tensor
    """Read where it lies: changes in place are followed."""
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Attention:
    """Linears and sizes of grouped-query attention (arXiv 2305.13245) with rotary positions."""

    q: CpuLinear
    k: CpuLinear
    v: CpuLinear
    o: CpuLinear
    query_heads: int
    key_heads: int
    head: int
    scale: float
    """Of queries times keys, before the softmax."""
    of_queries: RMSNorm | None = None
    of_keys: RMSNorm | None = None
    """Norms of every head, before it is rotated."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads of queries, heads of keys, numbers of each."""
        return self.query_heads, self.key_heads, self.head


@dataclass(frozen=True)
class DenseFFN:
    """down(act(gate x) * up x); without a gate, down(act(up x))."""

    up: CpuLinear
    down: CpuLinear
    act: Act
    gate: CpuLinear | None = None


@dataclass(frozen=True)
class ChosenFFN:
    """The neurons or experts that are chosen for a token, computed exactly."""

    chooser: CpuProposal | CpuRouter
    neurons: Kernel
    constant_D: Tensor | None = None
    """Added to y, in fp32."""


@dataclass(frozen=True)
class Norms:
    """Where a layer has norms: in front of its two parts, and behind them."""

    before_attention: RMSNorm | None = None
    behind_attention: RMSNorm | None = None
    before_ffn: RMSNorm | None = None
    behind_ffn: RMSNorm | None = None


def cannot_decode(
    dtype: torch.dtype,
    attention: Attention,
    norms: Norms | None = None,
    ffn: DenseFFN | ChosenFFN | None = None,
) -> str | None:
    """Returns why the kernels cannot compute a layer; None when they can."""
    if dtype not in FLOATS:
        return f"{dtype} is none of fp32, bf16 and fp16"
    if attention.head * dtype.itemsize % LINE or attention.head % 2:
        return f"a head of {attention.head} numbers in {dtype} fills no whole cache lines"
    if attention.query_heads % attention.key_heads:
        return f"{attention.query_heads} heads do not share {attention.key_heads}"
    if attention.query_heads // attention.key_heads > MOST_SHARING:
        return f"more than {MOST_SHARING} heads share one of keys"
    dense = ffn if isinstance(ffn, DenseFFN) else None
    if dense is not None and dense.gate is not None and dense.gate.dtype != dense.up.dtype:
        return f"the gate is stored in {dense.gate.dtype}, up in {dense.up.dtype}"
    return _misfit(dtype, attention, norms or Norms(), dense)


def _misfit(
    dtype: torch.dtype, attention: Attention, norms: Norms, ffn: DenseFFN | None
) -> str | None:
    """Returns what does not fit the rest: the kernels would read or write beside it."""
    width = attention.q.width
    queries, keys = (n * attention.head for n in (attention.query_heads, attention.key_heads))
    shapes = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}
    linears = {name: (vars(attention)[name], shape) for name, shape in shapes.items()}
    if ffn is not None:
        neurons = len(ffn.up.rows_NB)
        linears |= {"up": (ffn.up, (neurons, width)), "down": (ffn.down, (width, neurons))}
        if ffn.gate is not None:
            linears["gate"] = (ffn.gate, (neurons, width))
    for name, (linear, shape) in linears.items():
        if (len(linear.rows_NB), linear.width) != shape:
            has = f"{len(linear.rows_NB)} x {linear.width}"
            return f"{name} is {has}, the rest wants {shape[0]} x {shape[1]}"
    sizes = {"of_queries": attention.of_queries, "of_keys": attention.of_keys} | vars(norms)
    for role, norm in sizes.items():
        size = attention.head if role.startswith("of_") else width
        if norm is None:
            continue
        weight_D = norm.weight_D
        if weight_D.shape != (size,) or weight_D.dtype != dtype or not weight_D.is_contiguous():
            return f"the norm {role} is no row of {size} numbers in {dtype}"
    return None


class CpuDecoderLayer:
    """A layer that is prepared once and called for every token.

    Sums are in fp32 and are rounded to `dtype` where a matrix product reads them: fewer roundings
    than PyTorch makes in bf16. The result depends neither on the number of threads nor on their
    timing.

    Args:
        attention: see there.
        norms: see there.
        dtype: of h, of the cache and of the norms' weights: fp32, bf16 or fp16.
        ffn: that the second call ends with; None: the caller computes it.

    Raises:
        ValueError: `cannot_decode`.
    """

    def __init__(
        self,
        attention: Attention,
        norms: Norms,
        dtype: torch.dtype,
        ffn: DenseFFN | ChosenFFN | None = None,
    ) -> None:
        if why := cannot_decode(dtype, attention, norms, ffn):
            raise ValueError(why)
        self.dtype = dtype
        self.width = attention.q.width
        self.attention, self.norms, self.ffn = attention, norms, ffn
        self._native = extension()
        of_heads = {"of_queries": attention.of_queries, "of_keys": attention.of_keys}
        options: dict[str, object] = {}
        for name, norm in (vars(norms) | of_heads).items():
            options |= _norm(name, norm)
        act = ffn.act if isinstance(ffn, DenseFFN) else Act("identity")
        chosen = ffn if isinstance(ffn, ChosenFFN) else None
        chooser = None if chosen is None else chosen.chooser
        self.handle = self._native.prepare_layer(
            dtype=DTYPES.index(dtype),
            width=self.width,
            query_heads=attention.query_heads,
            key_heads=attention.key_heads,
            head=attention.head,
            scale=attention.scale,
            **{name: None if one is None else one.handle for name, one in self._linears().items()},
            act=act.code,
            threshold=act.threshold,
            proposal=chooser.handle if isinstance(chooser, CpuProposal) else None,
            router=chooser.handle if isinstance(chooser, CpuRouter) else None,
            neurons=None if chosen is None else chosen.neurons.handle,
            constant_D=address(None if chosen is None else chosen.constant_D),
            **options,
        )

    def linears(self) -> list[CpuLinear]:
        """Every linear that the kernels multiply by."""
        return [one for one in self._linears().values() if one is not None]

    def _linears(self) -> dict[str, CpuLinear | None]:
        heads, ffn = self.attention, self.ffn if isinstance(self.ffn, DenseFFN) else None
        return {
            "q": heads.q,
            "k": heads.k,
            "v": heads.v,
            "o": heads.o,
            "gate": None if ffn is None else ffn.gate,
            "up": None if ffn is None else ffn.up,
            "down": None if ffn is None else ffn.down,
        }

    def new_heads(
        self, h_B1D: Tensor, cos_B1W: Tensor, sin_B1W: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes queries (B, H, 1, W), keys and values (B, K, 1, W) of the new tokens.

        Args:
            h_B1D: what enters the layer; contiguous.
            cos_B1W: of the tokens' positions, or of one for all (1, 1, W); contiguous.
            sin_B1W: likewise.
        """
        sizes, sequences = self.attention, len(h_B1D)
        q_BH1W = h_B1D.new_empty((sequences, sizes.query_heads, 1, sizes.head))
        k_BK1W = h_B1D.new_empty((sequences, sizes.key_heads, 1, sizes.head))
        v_BK1W = h_B1D.new_empty((sequences, sizes.key_heads, 1, sizes.head))
        self._native.new_heads(
            self.handle,
            threads=torch.get_num_threads(),
            sequences=sequences,
            h_BD=h_B1D.data_ptr(),
            cos_BW=cos_B1W.data_ptr(),
            sin_BW=sin_B1W.data_ptr(),
            positions=len(cos_B1W),
            q_BHW=q_BH1W.data_ptr(),
            k_BKW=k_BK1W.data_ptr(),
            v_BKW=v_BK1W.data_ptr(),
        )
        return q_BH1W, k_BK1W, v_BK1W

    def new_token(
        self,
        h_B1D: Tensor,
        q_BH1W: Tensor,
        keys_BKSW: Tensor,
        values_BKSW: Tensor,
        mask_B11S: Tensor | None,
        knob: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Computes h behind the layer; without an FFN, h behind attention and the FFN's x.

        The second tensor is that x. With an FFN, anything is in it.

        Args:
            h_B1D: what entered the layer; contiguous.
            q_BH1W: from `new_heads`.
            keys_BKSW: of the whole cache, this token included; numbers of a position side by side.
            values_BKSW: likewise.
            mask_B11S: bool, or numbers that are added to the scores; B may be 1; None: all count.
            knob: of a proposal or a router: the threshold, or how many.
        """
        out_B1D, x_B1D = torch.empty_like(h_B1D), torch.empty_like(h_B1D)
        mask = _NO_MASK if mask_B11S is None else _mask(mask_B11S)
        self._native.new_token(
            self.handle,
            threads=torch.get_num_threads(),
            sequences=len(h_B1D),
            positions=keys_BKSW.shape[2],
            h_BD=h_B1D.data_ptr(),
            q_BHW=q_BH1W.data_ptr(),
            keys=keys_BKSW.data_ptr(),
            keys_sequence=keys_BKSW.stride(0),
            keys_head=keys_BKSW.stride(1),
            keys_position=keys_BKSW.stride(2),
            values=values_BKSW.data_ptr(),
            values_sequence=values_BKSW.stride(0),
            values_head=values_BKSW.stride(1),
            values_position=values_BKSW.stride(2),
            **mask,
            knob=float(knob),
            out_BD=out_B1D.data_ptr(),
            x_BD=x_B1D.data_ptr(),
        )
        return out_B1D, x_B1D


class CpuStack:
    """Layers of one size, one behind the other, in one native call for each token.

    Args:
        layers: with an FFN each.
        last: the norm behind them.
    """

    def __init__(self, layers: Sequence[CpuDecoderLayer], last: RMSNorm | None = None) -> None:
        self.layers, self.last = tuple(layers), last
        self._handles = tuple(layer.handle for layer in layers)
        self._norms = {False: _norm("last", None), True: _norm("last", last)}
        self._native = extension()

    def __call__(
        self,
        h_B1D: Tensor,
        cos_B1W: Tensor,
        sin_B1W: Tensor,
        cache_2LBKSW: Tensor,
        used: int,
        mask_B11S: Tensor | None,
        knobs: Sequence[float],
        *,
        normed: bool = False,
    ) -> Tensor:
        """Computes h behind the last layer, and writes the new position of every cache.

        Args:
            h_B1D: what enters the first layer; contiguous.
            cos_B1W: as in `CpuDecoderLayer.new_heads`.
            sin_B1W: likewise.
            cache_2LBKSW: keys of every layer, and values, with room behind the positions in use;
                numbers of a position side by side.
            used: positions in use; the new one is written behind them.
            mask_B11S: as in `CpuDecoderLayer.new_token`.
            knobs: of every layer, as in `CpuDecoderLayer.new_token`.
            normed: end with the norm behind them.
        """
        out_B1D = torch.empty_like(h_B1D)
        numbers = array("d", knobs)
        both, layer, sequence, head, position, _ = cache_2LBKSW.stride()
        keys = cache_2LBKSW.data_ptr()
        self._native.run_stack(
            self._handles,
            threads=torch.get_num_threads(),
            sequences=len(h_B1D),
            used=used,
            h_BD=h_B1D.data_ptr(),
            cos_BW=cos_B1W.data_ptr(),
            sin_BW=sin_B1W.data_ptr(),
            positions=len(cos_B1W),
            keys=keys,
            values=keys + both * cache_2LBKSW.itemsize,
            layer=layer,
            sequence=sequence,
            head=head,
            position=position,
            **(_NO_MASK if mask_B11S is None else _mask(mask_B11S)),
            knobs=numbers.buffer_info()[0],
            **self._norms[normed],
            out_BD=out_B1D.data_ptr(),
        )
        return out_B1D


def _norm(name: str, norm: RMSNorm | None) -> dict[str, object]:
    """A norm, as csrc/module.cpp reads it."""
    return {
        name: 0 if norm is None else address(norm.weight_D),
        f"{name}_eps": 0.0 if norm is None else norm.eps,
        f"{name}_offset": 0.0 if norm is None else norm.offset,
    }


def _mask(mask_B11S: Tensor) -> dict[str, int]:
    """A mask, as csrc/decoder_layer.h has it."""
    added = mask_B11S.dtype in FLOATS
    return {
        "mask": _ADDED if added else _ALLOWED,
        "mask_dtype": DTYPES.index(mask_B11S.dtype) if added else 0,
        "mask_BS": mask_B11S.data_ptr(),
        "mask_sequence": mask_B11S.stride(0) if len(mask_B11S) > 1 else 0,
    }
