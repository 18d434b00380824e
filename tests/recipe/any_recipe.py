"""Random recipes: every step, every option, every registered kind, as a YAML file would say them.

What an option can be is read from its type, and what stands behind a name from the registries, so a
new option or kind is drawn as soon as it is there.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal

from hypothesis import strategies as st

from moe_tools.experts.routers import ROUTERS
from moe_tools.experts.selectors import SELECTORS
from moe_tools.hosts.activations import ACTIVATIONS
from moe_tools.recipe.recipe import STEPS
from moe_tools.training.losses import LOSSES

Drawn = st.SearchStrategy[Any]

PLAIN: dict[Any, Drawn] = {
    int: st.sampled_from([2, 1, 3, 0]),
    float: st.sampled_from([0.5, 0.25, 1.0, 1e-3, 0.0]),
    bool: st.booleans(),
    types.NoneType: st.none(),
}
"""A type -> values; an example shrinks to the first."""
EVERYWHERE: dict[str, Drawn] = {
    "tokens": st.sampled_from([64, 128, 1]),
    "batch_size": st.sampled_from([4, 1]),
    "expert_size": st.sampled_from([8, 10, 1, 48, 49]),
    "tau": st.sampled_from([0.5, 0.0, -0.5]),
}
"""Names of options whose type says too little."""


def recipes() -> Drawn:
    """Steps as recipes have them, most of the time; else any in any order."""
    dense = st.sampled_from(
        [[], ["swap"], ["train"], ["swap", "train"], ["quantize"], ["threshold"]]
    )
    after = st.lists(st.sampled_from(["fit", "train", "budget", "refit", "threshold"]), max_size=2)
    routed = st.one_of(st.just([]), after.map(lambda steps: ["split", "attach", *steps]))
    usual = st.tuples(dense, routed).map(lambda parts: parts[0] + parts[1])
    anything = st.lists(st.sampled_from(list(STEPS)), max_size=4)
    orders = st.one_of(usual, usual, usual, anything).filter(bool)
    steps = orders.flatmap(lambda order: st.tuples(*map(_step, order)))
    return steps.map(lambda steps: {"name": "any", "steps": list(steps)})


def _step(verb: str) -> Drawn:
    return _options(STEPS[verb]).map(lambda options: {verb: options})


@cache
def _options(kind: type) -> Drawn:
    """Options of a dataclass: those that are required and some of the others."""
    hints = typing.get_type_hints(kind)
    drawn = {each.name: _field(each.name, hints[each.name]) for each in fields(kind)}
    return _some(
        drawn,
        {
            each.name
            for each in fields(kind)
            if each.default is MISSING and each.default_factory is MISSING
        },
    )


def _field(name: str, hint: Any) -> Drawn:
    """Values of a field: what it names stands in a registry, or its type says all."""
    named = {
        "activation": lambda: st.one_of(*map(_kind, *zip(*ACTIVATIONS.items(), strict=True))),
        "selector": lambda: st.one_of(*map(_kind, *zip(*SELECTORS.items(), strict=True))),
        "router": lambda: st.sampled_from(list(ROUTERS)),
        "router_options": lambda: st.one_of(st.just({}), *map(_defaults, ROUTERS.values())),
        "losses": lambda: st.dictionaries(
            st.sampled_from(list(LOSSES)), _value(typing.get_args(hint)[1]), max_size=2
        ),
    }
    return named[name]() if name in named else _argument(name, hint)


def _argument(name: str, hint: Any) -> Drawn:
    return EVERYWHERE[name] if name in EVERYWHERE else _value(hint)


def _kind(name: str, kind: type) -> Drawn:
    """An entry of a registry with the arguments that its class takes."""
    hints = typing.get_type_hints(kind.__init__)
    parameters = [each for each in _parameters(kind) if each.name in hints]
    drawn = {each.name: _argument(each.name, hints[each.name]) for each in parameters}
    needed = {each.name for each in parameters if each.default is each.empty}
    return _some(drawn, needed).map(lambda options: {"kind": name, **options})


def _defaults(kind: type) -> Drawn:
    """Options of a router: the parameters of its class that have a default."""
    hints = typing.get_type_hints(kind.__init__)
    known = [each.name for each in _parameters(kind) if each.default is not each.empty]
    return _some({name: _value(hints[name]) for name in known}, set())


def _parameters(kind: type) -> list[inspect.Parameter]:
    return [
        each
        for each in inspect.signature(kind).parameters.values()
        if each.kind is each.POSITIONAL_OR_KEYWORD
    ]


def _some(drawn: Mapping[str, Drawn], needed: set[str]) -> Drawn:
    """A dictionary of what is needed and any of the rest."""
    return st.fixed_dictionaries(
        {name: drawn[name] for name in sorted(needed)},
        optional={name: values for name, values in drawn.items() if name not in needed},
    )


def _value(hint: Any) -> Drawn:
    """A value of an annotated type, as YAML has it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*map(_value, arguments))
    if origin is tuple:
        return st.lists(_value(arguments[0]), min_size=1, max_size=3)
    return _options(hint) if is_dataclass(hint) else PLAIN[hint]
