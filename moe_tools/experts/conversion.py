"""What `config.json` says about a converted model: enough to rebuild it around its weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import nn

from moe_tools.experts.division import Division
from moe_tools.experts.experts import ExpertFFN, Mode, expert_ffns
from moe_tools.experts.importance import Importance
from moe_tools.experts.routers import build_router
from moe_tools.experts.selectors import Selector, build_selector, describe_selector
from moe_tools.hosts.ffn import FFN, Outline, graft, unfused_ffns
from moe_tools.hosts.input_threshold import thresholds_in
from moe_tools.hosts.linears import device_of, dtype_of
from moe_tools.hosts.proof import settle
from moe_tools.hosts.rows import rows_of, write_rows
from moe_tools.registry import short, unknown
from moe_tools.typed import fits

FORMAT = 3
READ = (1, 2, 3)
"""Formats that this version reads. Blocks of format 1 have no `layouts`; those of 1 and 2 know no
`weight_bits`, `thresholds`, `constants` and `prompt_share`."""

Off = Literal["zero", "mean"]
"""What an expert that is off contributes to the hidden activations."""


@dataclass(frozen=True)
class Conversion:
    """The `moe_tools` block of `config.json`."""

    donor: str
    """The dense model it was made from: folder, hub id or GGUF file, as the user gave it."""
    expert_size: int | None = None
    """Neurons of one expert, see `Division.of_size` where it does not divide them; None: the
    neurons are as the donor has them."""
    router: str | None = None
    """Kind of router; None: the model is still dense."""
    selector: dict[str, Any] | None = None
    mode: Mode = "hard"
    when_off: Off = "zero"
    shared_experts: int = 0
    """Experts that always run: the first ones of every FFN."""
    router_options: dict[str, Any] = field(default_factory=dict)
    selector_of: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of an FFN -> its selector, where it is not `selector`."""
    activation: dict[str, Any] | None = None
    """What every FFN has in place of the donor's activation, e.g. {"kind": "relu"}; None: the
    donor's."""
    activation_of: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of an FFN -> its activation, where it is not `activation`."""
    stock_activation: str | None = None
    """Where no stock class knows the activation: the one to build the host with, by its name."""
    layouts: dict[str, dict[str, Any]] | None = None
    """Where the host keeps its FFNs: class or path of a holder -> its layout, as it was proven
    before the conversion (`moe_tools.hosts.rows`). None: as moe-tools knew it when it wrote format
    1."""
    weight_bits: int | None = None
    """The FFNs' weights lie on a grid of so many bits, in groups of 32 (`quantize`); None: as they
    came."""
    thresholds: dict[str, dict[str, Any]] | None = None
    """Which inputs of which linears are dropped (`threshold`): site -> its `Row`
    (`moe_tools.thresholds.rows`); None: none."""
    constants: bool = False
    """Every FFN adds a bias, and a constant for each expert of more than one neuron that is off
    (`refit`)."""
    prompt_share: float | None = None
    """Share of the neurons that go on after the prompt (`select`); None: all of them."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not isinstance(self.expert_size, int | None):
            raise ValueError(f"expert_size is a number of neurons, not {self.expert_size!r}")
        if self.router is not None and self.expert_size is None:
            raise ValueError(f"router {self.router} needs experts: expert_size is missing")
        if self.weight_bits not in (None, 4, 8):
            raise ValueError(f"weight_bits is 4, 8 or null, not {self.weight_bits!r}")
        for kind, value, known in (("mode", self.mode, Mode), ("when_off", self.when_off, Off)):
            if value not in get_args(known):
                raise unknown(kind, str(value), get_args(known))
        if self.prompt_share is not None:
            if not 0 < self.prompt_share <= 1:
                raise ValueError(f"prompt_share is {self.prompt_share}, but must be in (0, 1]")
            if self.router is not None:
                raise ValueError(f"router {self.router} and prompt_share both select: have one")

    def to_dict(self) -> dict[str, Any]:
        """The JSON block."""
        return asdict(self)

    @classmethod
    def from_dict(cls, block: Any) -> Conversion:
        """Reads the JSON block.

        Raises:
            ValueError: no mapping, an unknown or a missing key, a value that no field allows, or a
                format newer than this code.
        """
        if not isinstance(block, dict):
            raise ValueError(f"the moe_tools block of config.json is no mapping: {block!r}")
        if block.get("format") not in READ:  # first: a newer format may have new keys
            raise ValueError(
                f"config.json has moe_tools format {block.get('format')!r}; this version reads 1 "
                f"to {FORMAT}: install the moe-tools that wrote it"
            )
        known = {entry.name for entry in fields(cls)}
        for key in block:
            if key not in known:
                raise unknown("key in the moe_tools block of config.json", key, known)
        if "donor" not in block:
            raise ValueError("the moe_tools block of config.json lacks donor")
        hints = get_type_hints(cls)
        for key, value in block.items():
            if not fits(value, hints[key]):
                raise ValueError(
                    f"{key} in the moe_tools block of config.json is {short(value)}, which is no "
                    f"{cls.__annotations__[key]}"
                )
        for key in ("activation", "selector"):
            if isinstance(block.get(key), dict) and not isinstance(block[key].get("kind"), str):
                raise ValueError(f"{key} in the moe_tools block of config.json has no kind")
        return cls(**{**block, "format": FORMAT})

    def unrouted(self) -> Conversion:
        """The dense model's: activations and split stay, every neuron runs on all its inputs."""
        return replace(
            self,
            router=None,
            selector=None,
            router_options={},
            selector_of={},
            thresholds=None,
            constants=False,
            prompt_share=None,
        )

    @property
    def stock(self) -> bool:
        """Whether the stock class, without any module of ours, computes what the folder means."""
        return self.router is None and self.thresholds is None and self.stock_activation is None

    def check_names(self, ffns: Sequence[FFN]) -> None:
        """Whether every FFN that has settings of its own is there.

        Raises:
            ValueError: a name in `selector_of` or `activation_of` that is none of theirs.
        """
        known = {ffn.name for ffn in ffns}
        for key in ("selector_of", "activation_of"):
            for name in getattr(self, key):
                if name not in known:
                    raise unknown(f"FFN in {key}", name, known)

    def divide(self, neurons: int, name: str) -> Division:
        """The experts of an FFN.

        Raises:
            ValueError: an expert exceeds the FFN called `name`.
        """
        assert self.expert_size is not None
        return Division.of_size(neurons, self.expert_size, name)


def read_conversion(model: nn.Module) -> Conversion | None:
    """What was done to a model; None for one that moe-tools never touched.

    The config says it, but for mode and selectors of a routed model: its FFNs hold these, and may
    have been given others.

    Raises:
        ValueError: a block that this version cannot read; FFNs in several modes or in one that
            they cannot have, or a selector that is in no registry: no config can say that.
    """
    conversion, ffns = read_block(model.config), expert_ffns(model)
    if conversion is None or not ffns:
        return conversion
    modes = {ffn.mode: ffn.name for ffn in ffns}
    if len(modes) > 1:
        found = ", ".join(f"{name} is {mode}" for mode, name in modes.items())
        raise ValueError(f"the FFNs are in several modes ({found}): give all of them one")
    for ffn in ffns:
        ffn.check_mode(ffn.mode)
    common = describe_selector(build_selector(conversion.selector or {}))
    found_of = {ffn.name: describe_selector(ffn.selector) for ffn in ffns}
    own = {name: selector for name, selector in found_of.items() if selector != common}
    return replace(conversion, mode=ffns[0].mode, selector_of=own)


def read_block(config: Any) -> Conversion | None:
    """The `moe_tools` block of a host's config, None where there is none."""
    block = getattr(config, "moe_tools", None)
    return None if block is None else Conversion.from_dict(block)


def conversion_so_far(model: nn.Module, donor: str) -> Conversion:
    """The model's block, now with this donor; an empty one where moe-tools changed nothing yet.

    Raises:
        ValueError: as `check_unselected`; or inputs are dropped, by what the FFNs were until now.
    """
    check_unselected(model)
    if thresholds_in(model):
        raise ValueError(
            f"inputs of {type(model).__name__} have thresholds, which belong to its FFNs as they "
            "are: put `threshold` after all that changes these"
        )
    return with_layouts(model, replace(read_conversion(model) or Conversion(donor), donor=donor))


def check_unselected(model: nn.Module) -> None:
    """Whether a model can take a step: selection by the prompt is the last one.

    Raises:
        ValueError: it selects by the prompt.
    """
    conversion = read_conversion(model)
    if conversion is not None and conversion.prompt_share is not None:
        raise ValueError(
            f"{type(model).__name__} selects its neurons by the prompt, for inference alone: "
            "`select` is the last step"
        )


def update_config(model: nn.Module) -> None:
    """Brings the block in a model's config up to what its FFNs are; before every `save`.

    Raises:
        ValueError: as `read_conversion`.
    """
    conversion = read_conversion(model)
    if conversion is not None:
        write_conversion(model, conversion)


def write_conversion(model: nn.Module, conversion: Conversion | None) -> None:
    """Puts the block into the model's config, with the layouts of its FFNs; None takes it out."""
    if conversion is not None and conversion.layouts is None:
        conversion = replace(conversion, layouts=_layouts(model))
    write_block(model.config, conversion)


def write_block(config: Any, conversion: Conversion | None) -> None:
    """Puts the block into a config as it is; None takes it out."""
    # A folder with pictures and text is also loaded as its language model, by that part's config.
    for part in (config, config.get_text_config()):
        vars(part).pop("moe_tools", None)
        if conversion is not None:
            part.moe_tools = conversion.to_dict()


def with_layouts(model: nn.Module, conversion: Conversion) -> Conversion:
    """The conversion with the layouts of a model's FFNs, each proven before anything is changed.

    Raises:
        ValueError: an FFN that moe-tools does not compute as its host does.
    """
    if conversion.layouts is not None:
        return conversion
    settle(model)
    return replace(conversion, layouts=_layouts(model))


def _layouts(model: nn.Module) -> dict[str, Any]:
    """What the block in a model's config says, or a new one would."""
    block = read_block(getattr(model, "config", None))
    if block is not None and block.layouts is not None:
        return block.layouts
    return write_rows(model, rows_of(model))


def divided(model: nn.Module) -> dict[str, Importance]:
    """Name of every FFN that was split, routed or not yet -> its experts.

    Raises:
        ValueError: no split was made.
    """
    if routed := expert_ffns(model):
        return {ffn.name: ffn.importance() for ffn in routed}
    block = read_block(model.config)
    if block is None or block.expert_size is None:
        raise ValueError("no experts: put `split` before this step")
    shared = block.shared_experts
    return {
        ffn.name: Importance(block.divide(ffn.neurons, ffn.name), shared, ffn.weights().down_FD)
        for ffn in unfused_ffns(model)
    }


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Gives every routed FFN a mode.

    Raises:
        ValueError: the model is dense, there is no such mode, or an FFN cannot have it.
    """
    if mode not in get_args(Mode):
        raise unknown("mode", mode, get_args(Mode))
    ffns = expert_ffns(model)
    if not ffns:
        raise ValueError(f"{type(model).__name__} is dense: it has no routing mode to set")
    for ffn in ffns:  # all of them, or none
        ffn.check_mode(mode)
    for ffn in ffns:
        ffn.mode = mode
    update_config(model)


def set_selectors(model: nn.Module, selectors: Sequence[Selector]) -> None:
    """Gives every routed FFN its selector, in the host's order.

    Raises:
        ValueError: the model is dense.
    """
    ffns = expert_ffns(model)
    if not ffns:
        raise ValueError(f"{type(model).__name__} is dense: it has no selector to set")
    for ffn, selector in list(zip(ffns, selectors, strict=True)):  # all of them, or none
        ffn.selector = selector
    update_config(model)


def attach_experts(
    model: nn.Module, conversion: Conversion, *, empty: bool = False
) -> list[ExpertFFN]:
    """Grafts an `ExpertFFN` with a fresh router onto every FFN of a dense model.

    Args:
        model: dense.
        conversion: what to make of it.
        empty: the tensors of the routers are shapes on the meta device, as their numbers are in a
            file: none of the host's weights is read.

    Raises:
        ValueError: no router is named, an expert exceeds an FFN, no expert is left to route,
            router and selector or mode do not fit, settings of an FFN that is not there, or the
            model is routed already.
    """
    if conversion.router is None or conversion.selector is None:
        raise ValueError("a routed model needs a router and a selector; this conversion has none")
    conversion = with_layouts(model, conversion)
    found = unfused_ffns(model)
    conversion.check_names(found)
    made = [_expert_ffn(ffn, conversion, empty) for ffn in found]
    for ffn, module in zip(found, made, strict=True):  # first all checks, then the first change
        graft(model, ffn, module)
    write_conversion(model, conversion)
    return made


def _expert_ffn(ffn: FFN, conversion: Conversion, empty: bool) -> ExpertFFN:
    assert conversion.router is not None
    up, neurons, shared = ffn.projections.up, ffn.neurons, conversion.shared_experts
    device = torch.device("meta") if empty else device_of(up)
    division = conversion.divide(neurons, ffn.name)
    if not 0 <= shared < division.num_experts:
        raise ValueError(f"{ffn.name}: {shared} of {division.num_experts} experts cannot be shared")
    seen = Outline(ffn.name, ffn.layer, ffn.layout, ffn.also) if empty else ffn
    importance = Importance(division, shared, seen.weights().down_FD)
    with device if empty else nullcontext():
        router = build_router(conversion.router, conversion.router_options, seen, importance)
    selector = build_selector(conversion.selector_of.get(ffn.name, conversion.selector or {}))
    selector(torch.zeros(1, importance.routed))  # top-k refuses fewer experts than k
    if selector.needs_ratio_scale and not router.ratio_scale:
        raise ValueError(
            f"router {conversion.router} scores below 0, which selector "
            f"{describe_selector(selector)['kind']} cannot compare: use topk or threshold"
        )
    # The host's own tensors stay: a quantised one cannot go anywhere, not even where it is.
    module = ExpertFFN(ffn, division, router.to(device), selector, conversion.mode, shared)
    if conversion.when_off == "mean":
        module.off_F = torch.zeros(neurons, dtype=dtype_of(up) or torch.float32, device=device)
    if conversion.constants:
        module.add_constants()
    module.check_mode(conversion.mode)
    return module
