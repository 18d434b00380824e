"""How a host module holds an FFN: which of its parts is what.

`Layout` is the one form of it. `moe_tools.hosts.shapes` knows the layouts that hosts have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

from moe_tools.registry import short
from moe_tools.typed import fits


@dataclass(frozen=True)
class Layout:
    """The parts of an FFN, as paths below the host module that holds them all: the holder.

    A dropout may also be an attribute of the holder with a probability, for holders that call
    F.dropout.
    """

    up: str
    down: str
    act: str | None = None
    """The activation; None where it is a `function`, or where the row is `masked`."""
    gate: str | None = None
    """The GLU projection; the same path as `up` when one linear holds gate rows, then up rows."""
    interleaved: bool = False
    """Gate and up rows alternate in the fused linear."""
    function: str | None = None
    """Name in transformers' ACT2FN of an activation that is no module of the holder."""
    hidden_dropout: str | None = None
    """Dropout between the activation and the down projection."""
    output_dropout: str | None = None
    """Dropout after the down projection, where the FFN itself applies it."""
    casts_down: bool = False
    """The host casts h to the dtype of the down projection: T5 keeps that one in fp32 when it is
    loaded in fp16."""
    slot: str = ""
    """What our module replaces; empty: the holder, which maps x to y and does nothing else."""
    bypass: tuple[str, ...] = ()
    """Parts the host calls outside the slot: modules become Identity, probabilities 0."""
    masked: bool = False
    """Only the host knows what stands between up and down (limits, multipliers, statistics over
    the neurons). Our module replaces `down` and switches its input; the router reads the input of
    `up`. Exact, but every neuron is computed, and no kernel runs it."""

    def parts(self) -> tuple[str, ...]:
        """Every path, each once, in the order of the forward pass."""
        paths = (self.gate, self.up, self.act, self.hidden_dropout, self.down, self.output_dropout)
        return tuple(dict.fromkeys(path for path in paths if path is not None))

    def moved(self) -> tuple[str, ...]:
        """The parts that our module takes in; the others stay where they are."""
        return (self.down,) if self.masked else self.parts()

    def as_masked(self) -> Layout:
        """The same FFN, with what stands between up and down left to the host."""
        return Layout(self.up, self.down, gate=self.gate, slot=self.down, masked=True)

    def in_words(self) -> str:
        """Its parts, and what is particular about them, for people."""
        parts = (self.gate, self.up, self.act or self.function, self.down)
        said = ", ".join(dict.fromkeys(part for part in parts if part is not None))
        if self.masked:
            return f"{said}; masked before {self.down}, as only the host knows what is between"
        return f"{said}, in the layer" if self.slot else said

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what differs from the defaults."""
        plain = asdict(self) | {"bypass": list(self.bypass)}
        return {
            entry.name: plain[entry.name]
            for entry in fields(self)
            if getattr(self, entry.name) != entry.default
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Layout:
        """Reads `to_dict`.

        Raises:
            ValueError: no mapping, a key that is no field, or a required one that is missing.
        """
        known = {entry.name for entry in fields(cls)}
        if not isinstance(row, Mapping) or not {"up", "down"} <= set(row) <= known:
            raise ValueError(f"no layout of an FFN: {short(row)}; its keys are {', '.join(known)}")
        hints = get_type_hints(cls) | {"bypass": list[str]}
        for key, value in row.items():
            if not fits(value, hints[key]):
                raise ValueError(f"no layout of an FFN: {key} is {short(value)}")
        return cls(**{**row, "bypass": tuple(row.get("bypass", ()))})


def child_name(layout: Layout, path: str) -> str:
    """What a part is called inside our module: its host name wherever it already lived there."""
    inside = f"{layout.slot}." if layout.slot else ""
    return path.removeprefix(inside).replace(".", "_")


def inside(layout: Layout) -> Layout:
    """The layout of our module: the parts of `layout`, as paths below it."""
    names: dict[str, Any] = {
        entry: None if path is None else child_name(layout, path)
        for entry in ("gate", "up", "act", "hidden_dropout", "down", "output_dropout")
        for path in (getattr(layout, entry),)
    }
    return replace(layout, slot="", bypass=(), **names)


def holder_of(name: str, layout: Layout) -> str:
    """The path of the holder, from that of the slot."""
    return name.removesuffix(layout.slot).removesuffix(".")


def host_names(name: str, layout: Layout) -> dict[str, str]:
    """Prefixes of our module's tensors -> the host's own, where the two differ."""
    holder = holder_of(name, layout)
    pairs = {
        f"{name}.{child_name(layout, path)}.": f"{join(holder, path)}." for path in layout.moved()
    }
    return {ours: host for ours, host in pairs.items() if ours != host}


def join(holder: str, path: str) -> str:
    """The path of a part, from the path of its holder; either may be empty."""
    return ".".join(part for part in (holder, path) if part)


def layer_of(path: str) -> str:
    """The path of the layer that holds a module: model.layers.3 for model.layers.3.mlp.up_proj."""
    names = path.split(".")
    first = next(place for place, name in enumerate(names) if name.isdigit())
    return ".".join(names[: first + 1])
