"""Forces experts on or off, or gives selectors another setting, for a while.

Letters: T tokens, E experts, K experts that are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.selectors import Selector
from moe_tools.registry import unknown

FFNName = str | int
"""The name of a routed FFN, or its index among the model's."""
Experts = Mapping[FFNName, Sequence[int]]
"""FFN -> indices of its experts."""


@contextmanager
def intervene(
    model: nn.Module,
    *,
    on: Experts | None = None,
    off: Experts | None = None,
    **knob: float | Mapping[FFNName, float],
) -> Iterator[None]:
    """While it lasts, experts are forced on or off and selectors have another setting.

    The forced mask is what the FFN computes, what observers see, and what `optimize` runs. An
    expert that is forced off contributes what an expert that is off does: zero, or its mean.
    Afterwards the model is exactly as before, whatever happened. Interventions nest: the inner
    ones come last.

    Args:
        model: routed, in any mode but soft. In mode weighted the weights are those of the forced
            mask.
        on: experts that run for every token, e.g. {"model.layers.3.mlp": [17]} or {3: [17]}.
        off: experts that run for none; shared experts, too.
        **knob: the selectors' setting, by its name: tau of threshold and dynamic-k, share of top-k,
            p of top-p. One number for all FFNs, or FFN -> number.

    Raises:
        ValueError: a model without routers, an FFN or expert that it does not have, an expert that
            is both on and off, another knob than the selector's, a value that it does not take, or
            mode soft, in which no expert is off.
    """
    ffns = routed_by_name(model)
    selectors = _selectors(ffns, knob)
    changes = _changes(ffns, on or {}, off or {})
    kept = {name: (ffns[name].selector, list(ffns[name].interventions)) for name in ffns}
    try:
        for name, selector in selectors.items():
            ffns[name].selector = selector
        for name, change in changes.items():
            ffns[name].interventions.append(change)
        yield
    finally:
        for name, (selector, interventions) in kept.items():
            ffns[name].selector = selector
            ffns[name].interventions[:] = interventions


def routed_by_name(model: nn.Module) -> dict[str, ExpertFFN]:
    """The routed FFNs by name, in the host's order.

    Raises:
        ValueError: there is none.
    """
    found = {ffn.name: ffn for ffn in expert_ffns(model)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no routed FFN: convert it first")
    return found


def ffn_name(ffns: Mapping[str, ExpertFFN], name: FFNName) -> str:
    """The name of the FFN that a name or an index means.

    Raises:
        ValueError: no such FFN.
    """
    if isinstance(name, str):
        if name not in ffns:
            raise unknown("FFN", name, ffns)
        return name
    if not 0 <= name < len(ffns):
        raise ValueError(f"there is no FFN {name}: the model has {len(ffns)}, from 0 on")
    return list(ffns)[name]


def check_expert(ffn: ExpertFFN, expert: int) -> int:
    """Returns the expert's index if the FFN has such an expert.

    Raises:
        ValueError: the FFN does not have it.
    """
    count = ffn.division.num_experts
    if not 0 <= expert < count:
        raise ValueError(f"{ffn.name} has {count} experts, from 0 on: there is no expert {expert}")
    return expert


def _selectors(
    ffns: Mapping[str, ExpertFFN], knobs: Mapping[str, float | Mapping[FFNName, float]]
) -> dict[str, Selector]:
    found = {}
    for knob, values in knobs.items():
        if not isinstance(values, Mapping):
            values = dict.fromkeys(ffns, values)
        for key, value in values.items():
            name = ffn_name(ffns, key)
            selector = ffns[name].selector
            if knob != selector.knob:
                raise unknown(f"knob of {name}", knob, [selector.knob] if selector.knob else [])
            found[name] = selector.with_knob(value)
    return found


def _changes(
    ffns: Mapping[str, ExpertFFN], on: Experts, off: Experts
) -> dict[str, Callable[[Tensor], Tensor]]:
    ons, offs = _named(ffns, on), _named(ffns, off)
    for name in ons.keys() & offs.keys():
        if both := ons[name] & offs[name]:
            raise ValueError(f"{name}: expert {min(both)} cannot be both on and off")
    for name in ons.keys() | offs.keys():
        if ffns[name].mode == "soft":
            raise ValueError(f"{name} is in mode soft, where no expert is off: use mode hard")
    return {
        name: _change(sorted(ons.get(name, ())), sorted(offs.get(name, ())))
        for name in ons.keys() | offs.keys()
    }


def _named(ffns: Mapping[str, ExpertFFN], experts: Experts) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for key, chosen in experts.items():
        name = ffn_name(ffns, key)
        found.setdefault(name, set()).update(check_expert(ffns[name], e) for e in chosen)
    return found


def _change(on_K: list[int], off_K: list[int]) -> Callable[[Tensor], Tensor]:
    def change(mask_TE: Tensor) -> Tensor:
        forced_TE = mask_TE.clone()
        forced_TE[..., torch.tensor(on_K, dtype=torch.long)] = True
        forced_TE[..., torch.tensor(off_K, dtype=torch.long)] = False
        return forced_TE

    return change
