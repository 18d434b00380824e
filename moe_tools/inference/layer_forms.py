"""Which decoder layers of transformers the native kernels can compute, and their parts.

A layer is known by its code: that of its `forward`, and of its attention's, has to be the code of a
form below in the transformers that is installed. Most families share these, since transformers
generates their files from one another. Norms are known by what they compute.

Letters: D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from moe_tools.hosts.proof import NEAR
from moe_tools.inference.packed_linear import PackedLinear
from moe_tools.kernels.cpu.decoder_layer import Attention, Norms, RMSNorm, cannot_decode

FFN = "mlp"
"""Every form calls its FFN so."""
ATTENTION = "self_attn"


@dataclass(frozen=True)
class NormNames:
    """What a form calls the norms in front of its two parts, and behind them."""

    before_attention: str | None
    behind_attention: str | None
    before_ffn: str | None
    behind_ffn: str | None

    def all(self) -> list[str]:
        """Those that are there."""
        return [name for name in vars(self).values() if name is not None]


INTO_ATTENTION, INTO_FFN = "input_layernorm", "post_attention_layernorm"
PRE_NORM = NormNames(INTO_ATTENTION, None, INTO_FFN, None)
_POST = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_BOTH = NormNames(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_LAYERS: tuple[tuple[type[nn.Module], NormNames], ...] = (
    (modeling_llama.LlamaDecoderLayer, PRE_NORM),
    (modeling_mixtral.MixtralDecoderLayer, PRE_NORM),
    (modeling_olmo2.Olmo2DecoderLayer, _POST),
    (modeling_gemma3.Gemma3DecoderLayer, _BOTH),
)
_ATTENTIONS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (modeling_llama.LlamaAttention, ()),
    (modeling_mistral.MistralAttention, ()),
    (modeling_qwen2.Qwen2Attention, ()),
    (modeling_qwen3.Qwen3Attention, ("q_norm", "k_norm")),
    (modeling_gemma3.Gemma3Attention, ("q_norm", "k_norm")),
)
"""Each with the norms of its heads: queries, keys."""


@dataclass(frozen=True)
class Found:
    """A layer of a known form: what the kernels take, and the paths of the modules they replace."""

    attention: Attention
    norms: Norms
    names: NormNames
    paths: tuple[str, ...]
    norm_paths: tuple[str, ...]
    """Those of them that are norms."""
    dtype: torch.dtype
    index: int
    """Of the layer in the cache."""

    def widened(self) -> Found:
        """The same layer for h in fp32, with the norms' weights as they are now."""
        roles = {role: _widened(norm) for role, norm in vars(self.norms).items()}
        heads = self.attention
        attention = replace(
            heads, of_queries=_widened(heads.of_queries), of_keys=_widened(heads.of_keys)
        )
        return replace(self, attention=attention, norms=Norms(**roles), dtype=torch.float32)


def find(layer: nn.Module, host: type[nn.Module]) -> Found | str | None:
    """Returns the parts of a layer; why it cannot be computed; None where it is of no known form.

    Args:
        layer: with packed linears.
        host: its class, as transformers made it.
    """
    names = _norms_by_code().get(code_of(host.forward))
    module = layer._modules.get(ATTENTION)
    heads = None if module is None else _heads_by_code().get(code_of(type(module).forward))
    if names is None or module is None or heads is None:
        return None
    linears = [module._modules.get(f"{name}_proj") for name in "qkvo"]
    if not all(isinstance(linear, PackedLinear) for linear in linears):
        return "its projections do not run on packed rows"
    q, k, v, o = (linear.packed for linear in cast("list[PackedLinear]", linears))
    found = {name: rms_norm(layer.get_submodule(name)) for name in names.all()}
    found |= {name: rms_norm(module.get_submodule(name)) for name in heads}
    for name, norm in found.items():
        if norm is None:
            return f"{name} is no root mean square norm"
    dtypes = {norm.weight_D.dtype for norm in found.values() if norm is not None}
    if len(dtypes) != 1:
        return "its norms are of several dtypes"
    (dtype,) = dtypes
    sizes = cast("Any", module)
    attention = Attention(
        q,
        k,
        v,
        o,
        query_heads=len(q.rows_NB) // sizes.head_dim,
        key_heads=len(k.rows_NB) // sizes.head_dim,
        head=sizes.head_dim,
        scale=float(sizes.scaling),
        of_queries=found[heads[0]] if heads else None,
        of_keys=found[heads[1]] if heads else None,
    )
    norms = Norms(**{role: found.get(name) for role, name in vars(names).items()})
    if why := cannot_decode(dtype, attention, norms):
        return why
    norm_paths = (*(f"{ATTENTION}.{name}" for name in heads), *names.all())
    paths = (ATTENTION, *(f"{ATTENTION}.{name}_proj" for name in "qkvo"), *norm_paths)
    return Found(attention, norms, names, paths, norm_paths, dtype, sizes.layer_idx)


def is_pre_norm(host: type[nn.Module]) -> bool:
    """Whether a layer of this class is of a known form whose norms are in front of its parts."""
    names = _norms_by_code().get(code_of(host.forward))
    return names is not None and names == PRE_NORM


@torch.no_grad()
def rms_norm(module: nn.Module) -> RMSNorm | None:
    """Returns what a norm computes, if that is a root mean square norm; else None.

    Tried on numbers of several sizes: small ones show `eps`.
    """
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(weight) is not nn.Parameter or weight.ndim != 1 or not isinstance(eps, float):
        return None
    if not weight.is_cpu or weight.dtype not in NEAR:
        return None
    drawn = torch.Generator().manual_seed(0)
    x_D = torch.randn(len(weight), generator=drawn, dtype=torch.float32)
    for offset in (0.0, 1.0):
        norm = RMSNorm(weight, eps, offset)
        if all(_computes(module, norm, (size * x_D).to(weight.dtype)) for size in (1, 30, 1e-3)):
            return norm
    return None


def _widened(norm: RMSNorm | None) -> RMSNorm | None:
    return None if norm is None else replace(norm, weight_D=norm.weight_D.float())


def _computes(module: nn.Module, norm: RMSNorm, x_D: Tensor) -> bool:
    try:
        y_D = module.forward(x_D[None, None])[0, 0].float()  # nobody's hook hears of it
    except Exception:  # a module that takes something else
        return False
    wide_D = x_D.float()
    expected_D = wide_D * torch.rsqrt(wide_D.square().mean() + norm.eps)
    expected_D = expected_D * (norm.weight_D.float() + norm.offset)
    near = NEAR[x_D.dtype] * float(expected_D.abs().max().clamp(min=1e-30))
    return y_D.shape == expected_D.shape and bool((y_D - expected_D).abs().max() <= near)


def code_of(function: Callable[..., Any]) -> tuple[Any, ...]:
    """What a function does: its code without names of files, lines and types, and its docstring."""
    code: CodeType = inspect.unwrap(function).__code__
    return code.co_code, code.co_names, code.co_varnames, code.co_consts[1:]


@cache
def _norms_by_code() -> dict[tuple[Any, ...], NormNames]:
    return {code_of(kind.forward): names for kind, names in _LAYERS}


@cache
def _heads_by_code() -> dict[tuple[Any, ...], tuple[str, ...]]:
    return {code_of(kind.forward): names for kind, names in _ATTENTIONS}
