"""What FFNs compute in a forward pass, for losses. Letters: T tokens, D model width, F neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.hooks import hooked
from moe_tools.experts.tokens import ValidTokens, valid_tokens
from moe_tools.hosts.ffn import FFN, unfused_ffns
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.hosts.projections import Projections

Kind = Literal["outputs", "hidden", "pre"]


@dataclass
class FFNTensors:
    """Tensors of every FFN, in forward order, with their graph; those not asked for stay empty.

    Padding is left out, where a mask says what it is.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    """y_TD of the down projections, by the FFN's name; of an MoE host's experts, the sum of those
    that it chose, weighed by its router, by the path of them all: two models of one donor may give
    different tokens to an expert, or none."""
    hidden: list[Tensor] = field(default_factory=list)
    """h_TF: what enters them."""
    hidden_of: list[str] = field(default_factory=list)
    """The names of the FFNs in `hidden`: a host may call its experts in another order."""
    pre: list[Tensor] = field(default_factory=list)
    """pre_TF: what enters the activations, where the FFN itself calls them."""


@contextmanager
def watch_ffns(model: nn.Module, kinds: set[Kind]) -> Iterator[FFNTensors]:
    """Yields what grows by the asked kinds with every forward pass."""
    seen = FFNTensors()
    if not kinds:
        yield seen
        return
    ffns: Sequence[ExpertFFN | FFN] = expert_ffns(model) or unfused_ffns(model)
    with valid_tokens(model) as tokens, hooked(_hooks(model, ffns, kinds, seen, tokens)):
        yield seen


def _hooks(
    model: nn.Module,
    ffns: Sequence[ExpertFFN | FFN],
    kinds: set[Kind],
    seen: FFNTensors,
    tokens: ValidTokens,
) -> Iterator[RemovableHandle]:
    if "outputs" in kinds:
        for name, module in _sources(model, ffns).items():
            keep = _named(seen.outputs, name, tokens)
            yield module.register_forward_hook(keep)
    for ffn in ffns:
        parts, valid = ffn.projections, _valid(ffn, tokens)
        if "hidden" in kinds:
            keep = _input(seen.hidden, seen.hidden_of, ffn.name, valid)
            yield parts.down.register_forward_pre_hook(keep)
        if "pre" in kinds:  # not at the activation: experts share one, and routers call it
            source = parts.up if parts.gate is None else parts.gate
            yield source.register_forward_hook(_gate_rows(seen.pre, parts, valid))


def _valid(ffn: ExpertFFN | FFN, tokens: ValidTokens) -> Callable[[Tensor], Tensor]:
    """What leaves the padding out of tensors whose rows are those of an FFN."""
    module = ffn if isinstance(ffn, ExpertFFN) else ffn.layer
    return lambda values_T: _rows(values_T, tokens.of_ffn(module, values_T))


def _rows(values_T: Tensor, valid_T: Tensor | None) -> Tensor:
    return values_T if valid_T is None else values_T[valid_T]


def _sources(model: nn.Module, ffns: Sequence[ExpertFFN | FFN]) -> dict[str, nn.Module]:
    """Name -> the module whose output is the FFN's, or that of all experts of an MoE layer."""
    hosts: dict[str, nn.Module] = {
        path: host for path, host in model.named_modules() if isinstance(host, HostExperts)
    }
    inside = tuple(f"{path}." for path in hosts)
    alone = {ffn.name: _last(ffn) for ffn in ffns if not ffn.name.startswith(inside)}
    return alone | hosts


def _last(ffn: ExpertFFN | FFN) -> nn.Module:
    """What gives the FFN's output: constants come after the down projection."""
    return ffn if isinstance(ffn, ExpertFFN) and ffn.bias_D is not None else ffn.down


def _named(tensors: dict[str, Tensor], name: str, tokens: ValidTokens) -> Callable[..., None]:
    def keep(module: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        tensors[name] = _rows(output, tokens.of_ffn(module, output))

    return keep


def _input(
    tensors: list[Tensor], names: list[str], name: str, valid: Callable[[Tensor], Tensor]
) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        tensors.append(valid(args[0]))
        names.append(name)

    return keep


def _gate_rows(
    tensors: list[Tensor], parts: Projections, valid: Callable[[Tensor], Tensor]
) -> Callable[..., None]:
    fused = parts.gate is parts.up

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        tensors.append(valid(parts.halves(output, dim=-1)[0] if fused else output))

    return keep
