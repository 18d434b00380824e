"""Where in a model inputs can be dropped: the linears of FFNs and attention that share an input.

A site is the linears that are given the same numbers: gate and up, or down; q, k and v, or o. Which
linears of an attention share their input is watched: no two families call them alike.

Letters: B blocks, T tokens, D numbers of a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_tools.data import Blocks
from moe_tools.data.generate import evaluating
from moe_tools.experts.experts import ExpertFFN, every_expert_on, expert_ffns
from moe_tools.experts.hooks import hooked
from moe_tools.hosts.ffn import FFN, unfused_ffns
from moe_tools.hosts.inputs import run_layers
from moe_tools.hosts.layouts import holder_of, layer_of
from moe_tools.hosts.linears import device_of, numbers_of, widths
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.hosts.projections import Projections

Role = Literal["input", "hidden"]
"""What enters an FFN or an attention first, or what enters its last linear."""
ROLES: tuple[Role, ...] = ("input", "hidden")


@dataclass(frozen=True)
class Site:
    """Linears of a model that are given the same numbers."""

    name: str
    """Name of the FFN and the role; of an attention, the path of the first linear."""
    role: Role
    group: str
    """Sites of one share: those of a layer's FFNs, or of an attention, with one role."""
    layer: str
    """Path of the layer that they are in."""
    calls: tuple[tuple[nn.Module, ...], ...]
    """The linears of a call are given the same numbers; modules that share their weights have a
    call each."""
    paths: tuple[str, ...] = ()
    """Of an attention's linears; those of an FFN are found by its name."""
    routed: bool = False
    """A number that is exactly 0 was turned off by a router: it is not there to be dropped."""
    shared: bool = True
    """Every token of the layer comes here: it is no expert of an MoE host."""

    @property
    def linears(self) -> list[nn.Module]:
        """All of them."""
        return [linear for linears in self.calls for linear in linears]

    @property
    def width(self) -> int:
        """D."""
        found = widths(self.linears[0])
        assert found is not None
        return found[0]

    @property
    def weights(self) -> int:
        """Matrix weights that are read for one token when nothing is dropped."""
        return sum(map(numbers_of, self.calls[0]))

    @property
    def device(self) -> torch.device:
        """Where its linears compute."""
        return device_of(self.linears[0])


def ffn_sites(model: nn.Module, roles: Sequence[Role] = ROLES) -> list[Site]:
    """The sites of a model's FFNs; fused experts are taken apart in place.

    Raises:
        ValueError: as `find_ffns`.
    """
    ffns: Sequence[ExpertFFN | FFN] = expert_ffns(model) or unfused_ffns(model)
    in_hosts = {path for path, module in model.named_modules() if isinstance(module, HostExperts)}
    sites = []
    for ffn in ffns:
        layer = layer_of(ffn.name)
        calls: dict[Role, list[tuple[nn.Module, ...]]] = {"input": [], "hidden": []}
        for parts in _projections(model, ffn):
            entered = parts.linears()[:-1]
            calls["input"].append(tuple(entered))
            calls["hidden"].append((parts.down,))
        sites += [
            Site(
                name=f"{ffn.name}:{role}",
                role=role,
                group=f"{layer} ffn {role}",
                layer=layer,
                calls=tuple(dict.fromkeys(calls[role])),
                routed=role == "hidden" and isinstance(ffn, ExpertFFN),
                shared=ffn.name.rpartition(".")[0] not in in_hosts,
            )
            for role in roles
        ]
    return sites


def _projections(model: nn.Module, ffn: ExpertFFN | FFN) -> Iterator[Projections]:
    """Of an FFN, and of every module of a dense host that shares its weights."""
    yield ffn.projections
    if isinstance(ffn, FFN):
        for path in ffn.also:
            layer = model.get_submodule(holder_of(path, ffn.layout))
            yield replace(ffn, name=path, layer=layer).projections


def attention_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> every linear inside an attention of a layer that has an FFN.

    Raises:
        ValueError: there is none.
    """
    ffns: Sequence[ExpertFFN | FFN] = expert_ffns(model) or unfused_ffns(model)
    layers = {layer_of(ffn.name) for ffn in ffns}
    ours = {id(linear) for ffn in ffns for linear in ffn.projections.linears()}
    inside: list[str] = []
    found = {}
    for path, module in model.named_modules():
        if not any(path.startswith(f"{layer}.") for layer in layers):
            continue
        called = f"{type(module).__name__} {path.rpartition('.')[2]}".lower()
        if "attention" in called or "attn" in called:
            inside.append(f"{path}.")
        if path.startswith(tuple(inside)) and widths(module) is not None and id(module) not in ours:
            found[path] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention with linears that moe-tools can find: use "
            "where: ffn"
        )
    return found


@torch.no_grad()
def attention_sites(
    model: nn.Module, blocks_BT: Blocks, roles: Sequence[Role] = ROLES
) -> list[Site]:
    """The sites of a model's attentions, by what their linears are given on the first block.

    A linear that is not called, as where a host reads its weight itself, is in none.

    Raises:
        ValueError: no attention with linears is found.
    """
    linears = attention_linears(model)
    calls: dict[tuple[str, int], list[str]] = {}
    held = []  # so that no other tensor gets the same id

    def note(path: str) -> Any:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            held.append(args[0])
            together = calls.setdefault((layer_of(path), id(args[0])), [])
            if not any(path in paths for paths in calls.values()):
                together.append(path)

        return see

    handles = (linear.register_forward_pre_hook(note(path)) for path, linear in linears.items())
    with evaluating(model), every_expert_on(model), hooked(handles):
        run_layers(model, blocks_BT[:1])
    return list(_named(linears, [paths for paths in calls.values() if paths], roles))


def _named(
    linears: dict[str, nn.Module], found: list[list[str]], roles: Sequence[Role]
) -> Iterator[Site]:
    """Sites from the paths that belong together; what an attention is given first is its input."""
    begun = set()
    for paths in found:
        attention = _holder(paths[0])
        role: Role = "hidden" if attention in begun else "input"
        begun.add(attention)
        if role in roles:
            yield Site(
                name=paths[0],
                role=role,
                group=f"{attention} {role}",
                layer=layer_of(paths[0]),
                calls=(tuple(linears[path] for path in paths),),
                paths=tuple(paths),
            )


def _holder(path: str) -> str:
    """The attention that a linear is in: the child of its layer, in T5 the item of a list."""
    layer = layer_of(path)
    below = re.match(r"\w+(\.\d+)?", path.removeprefix(f"{layer}."))
    assert below is not None
    return f"{layer}.{below[0]}"


def restored_sites(
    model: nn.Module, rows: dict[str, tuple[str, ...]], roles: Sequence[Role] = ROLES
) -> list[Site]:
    """The sites that were found before, by their names.

    Args:
        model: whose sites they are.
        rows: name -> the paths of an attention's linears; empty for an FFN's.
        roles: of the FFNs' sites.

    Raises:
        ValueError: one that is not there.
    """
    ffns = {site.name: site for site in ffn_sites(model, roles)} if rows else {}
    modules = dict(model.named_modules())
    found = []
    for name, paths in rows.items():
        if missing := [path for path in paths if path not in modules]:
            raise ValueError(f"thresholds: {type(model).__name__} has no linear {missing[0]}")
        if not paths and name not in ffns:
            raise ValueError(f"thresholds: {type(model).__name__} has no FFN input {name}")
        if not paths:
            found.append(ffns[name])
            continue
        linears = tuple(modules[path] for path in paths)
        found.append(Site(name, "input", name, layer_of(name), (linears,), paths))
    return found
