"""Turns a stock model that was just loaded into the converted model that its folder describes.

The config's block says what to add; the tensors are beside the host's in the same files. Every one
of them must be there, with its shape: nothing here is ever left at random.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.checkpoint.auto import admit, lacks
from moe_tools.checkpoint.broken import BrokenFolder
from moe_tools.checkpoint.sizes import apart
from moe_tools.checkpoint.stored import some, tensor_files
from moe_tools.experts.conversion import (
    Conversion,
    attach_experts,
    read_conversion,
    write_conversion,
)
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routers import ROUTERS
from moe_tools.experts.swapped import Unswapped, replace_stand_ins, swap_activations
from moe_tools.hosts.ffn import (
    GraftedFFN,
    find_ffns,
    host_name,
    read_host_names,
    stock_ffn_tensors,
)
from moe_tools.hosts.fused import fused_experts
from moe_tools.hosts.input_threshold import CHILD, InputThreshold, thresholds_in
from moe_tools.hosts.linears import device_of
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.inference.prompt import install
from moe_tools.thresholds.rows import put_rows, read_rows

Tensors = Sequence[str | Path] | Mapping[str, Tensor]
"""Weight files, or the tensors themselves."""


def rebuild(
    model: PreTrainedModel,
    tensors: Tensors,
    source: str,
    report: Any,
    offloaded: dict[str, Any] | None = None,
) -> None:
    """Adds to a model what the config's block says, in place: activations, routers, selection.

    Args:
        model: the stock class, its weights loaded.
        tensors: where they were loaded from.
        source: what the errors call the model.
        report: of transformers, on the host's tensors; what is ours is taken off its list of
            unexpected ones.
        offloaded: accelerate's index of the tensors that stay on disk; ours are added.

    Raises:
        BrokenFolder: a router's tensor, or the FFN's it belongs to, is missing or of another
            shape than the block says.
        ValueError: a block that this version cannot read, or that does not fit the host.
    """
    conversion = read_conversion(model)
    assert conversion is not None
    _check_host(model, source, report)
    if offloaded is not None:
        _check_places(model, conversion)
    stored = _stored(tensors)
    shift = _shift(model, stored)
    conversion = _renamed(conversion, shift)
    write_conversion(model, conversion)
    add_modules(model, conversion)
    if not conversion.stock:
        if offloaded is not None:
            _rename_offloaded(model, offloaded)
        _fill(model, {shift(key): (key, where) for key, where in stored.items()}, source, offloaded)
    _mark_loaded(model)
    model.register_load_state_dict_pre_hook(read_host_names)  # Trainer resumes from our folders
    added = added_tensors(model)
    report.unexpected_keys -= {key for key in report.unexpected_keys if shift(key) in added}


def add_modules(model: PreTrainedModel, conversion: Conversion) -> None:
    """Swaps activations, attaches routers and thresholds without numbers, lets the prompt select.

    Raises:
        ValueError: a block that does not fit the host.
    """
    replace_stand_ins(model, conversion.stock_activation)
    if conversion.stock_activation is not None:
        with apart():
            swap_activations(model, conversion)
    if conversion.router is not None:
        attach_experts(model, conversion, empty=True)
    put_rows(model, read_rows(conversion), empty=True)
    if conversion.prompt_share is not None:
        install(model, conversion.prompt_share)
    admit(model)


def of_base(model: PreTrainedModel, conversion: Conversion) -> Conversion:
    """The conversion of a folder with the FFNs' names in a base model, which has no head."""
    return _renamed(conversion, _Shift(cut=f"{model.base_model_prefix}."))


def check_rebuilt(model: nn.Module, source: str) -> None:
    """Checks that a loaded model is the one that its config describes, not its dense host.

    Raises:
        ValueError: its routers, its thresholds, its selection by the prompt or its activation are
            missing.
    """
    conversion = read_conversion(model)
    if conversion is None:
        return
    dense = lacks(model) is not None
    if dense or any(isinstance(module, Unswapped) for module in model.modules()):
        raise ValueError(
            f"{source} is a converted model, but transformers loaded its dense host: the weights "
            "are a distributed checkpoint (save them as safetensors), or another library has "
            "replaced PreTrainedModel._load_pretrained_model (call moe_tools.patch_transformers "
            "after it)"
        )


def _check_host(model: PreTrainedModel, source: str, report: Any) -> None:
    ffns = stock_ffn_tensors(model)
    for key, shape, expected in sorted(report.mismatched_keys):
        if key in ffns:
            raise BrokenFolder(f"{source}: {key} is {tuple(shape)}, expected {tuple(expected)}")
    tied = set(model.all_tied_weights_keys)  # another name of what is stored once
    if missing := ffns & set(report.missing_keys) - tied:
        raise BrokenFolder(f"{source} lacks the tensors {some(missing)}")


def _check_places(model: nn.Module, conversion: Conversion) -> None:
    """Checks that our modules need no weight that a device map leaves on disk.

    accelerate has its hooks on the host's own linears only.
    """
    for path, fused in fused_experts(model).items():
        if any(parameter.is_meta for parameter in fused.parameters()):
            raise ValueError(f"{path}: the experts of an MoE host cannot stay on disk")
    if conversion.prompt_share is not None:
        raise ValueError(
            "selection by the prompt copies the rows of FFNs, none of which can stay on disk then: "
            "load with a device_map that puts every layer on a device"
        )
    reads = conversion.router is not None and ROUTERS[conversion.router].reads_rows
    if conversion.thresholds and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("linears whose inputs have thresholds cannot stay on disk")
    if reads and any(device_of(ffn.projections.up).type == "meta" for ffn in find_ffns(model)):
        raise ValueError(
            f"router {conversion.router} reads the FFN's rows, which cannot stay on disk then"
        )


def _stored(tensors: Tensors) -> dict[str, Path | Tensor]:
    """Tensor name -> the tensor, or the file that holds it."""
    return dict(tensors) if isinstance(tensors, Mapping) else dict(tensor_files(tensors))


class _Shift:
    """Maps tensor names of a folder to names of a model that is a part of the folder's, or more."""

    def __init__(self, cut: str = "", put: str = "") -> None:
        self.cut, self.put = cut, put

    def __call__(self, name: str) -> str:
        return self.put + name.removeprefix(self.cut) if name.startswith(self.cut) else name


def _shift(model: PreTrainedModel, stored: Mapping[str, Any]) -> _Shift:
    """The shift under which most of a model's tensors are in the folder.

    Only one of the two may have a head, or what sees pictures beside the language model. The first
    tensor of the model that is in a list of layers shows what stands before the list in both.
    """
    names, prefix = set(model.state_dict()), f"{model.base_model_prefix}."
    shifts = [_Shift(), _Shift(cut=prefix), _Shift(put=prefix)]
    in_layers = next((name for name in sorted(names) if re.search(r"\.\d+\.", name)), None)
    if in_layers is not None:
        put, layers = _before_layers(in_layers)
        ends = (key for key in stored if key.endswith(f".{layers}"))
        shifts += [_Shift(key.removesuffix(layers), put) for key in ends]
    return max(shifts, key=lambda shift: len(names & {shift(key) for key in stored}))


def _before_layers(name: str) -> tuple[str, str]:
    """A tensor's name, divided before the list of layers that it is in."""
    parts = name.split(".")
    first = next(place for place, part in enumerate(parts) if part.isdigit()) - 1
    above = ".".join(parts[:first])
    return f"{above}." if above else "", ".".join(parts[first:])


def _renamed(conversion: Conversion, shift: _Shift) -> Conversion:
    """The conversion with the FFNs' names in the model, which may differ from the folder's."""
    rows = {
        shift(name): replace(row, linears=tuple(map(shift, row.linears))).to_dict()
        for name, row in read_rows(conversion).items()
    }
    return replace(
        conversion,
        thresholds=None if conversion.thresholds is None else rows,
        selector_of={shift(name): each for name, each in conversion.selector_of.items()},
        activation_of={shift(name): each for name, each in conversion.activation_of.items()},
        layouts=None if conversion.layouts is None else _shifted(conversion.layouts, shift),
    )


def _shifted(layouts: dict[str, Any], shift: _Shift) -> dict[str, Any]:
    """Layouts with the paths of their holders in the model; a class has no dot in its name."""
    return {shift(key) if "." in key else key: row for key, row in layouts.items()}


def added_tensors(model: nn.Module) -> set[str]:
    """Names of the tensors that a converted model has beside its host's, as they are saved."""
    return {*_of_routers(model), *_of_thresholds(model)}


def _of_routers(model: nn.Module) -> list[str]:
    return [f"{ffn.name}.{key}" for ffn in expert_ffns(model) for key in sorted(ffn.added())]


def _of_thresholds(model: nn.Module) -> dict[str, str]:
    """Name of a threshold's tensor as it is saved -> ours."""
    named = host_name(model)
    ours = [
        f"{path}.{key}"
        for path, threshold in thresholds_in(model).items()
        for key in threshold.state_dict()
    ]
    return {named(name): name for name in ours}


def _fill(
    model: nn.Module,
    stored: Mapping[str, tuple[str, Path | Tensor]],
    source: str,
    offloaded: dict[str, Any] | None,
) -> None:
    added = added_tensors(model)
    if missing := added - set(stored):
        kind = "router" if any(name in _of_routers(model) for name in missing) else "threshold"
        raise BrokenFolder(f"{source} lacks the {kind} tensors {some(missing)}")
    for ffn in expert_ffns(model):
        device = device_of(ffn.projections.up)
        for name in sorted(f"{ffn.name}.{key}" for key in ffn.added()):
            key, where = stored[name]
            empty = _put(model, name, _read(where, key), device, source)
            if offloaded is not None and device.type == "meta" and isinstance(where, Path):
                offloaded[name] = _entry(where, key, empty)
        buffers = ffn.router.named_buffers() if device.type != "meta" else ()
        if left := [name for name, one in buffers if one.is_meta]:
            raise ValueError(
                f"{ffn.name}: {some(left)} of its router is in no state dict, so no folder has it: "
                "a buffer is to be persistent, or made when it is needed"
            )
    for saved, name in _of_thresholds(model).items():
        key, where = stored[saved]
        linear = model.get_submodule(name.rpartition(f".{CHILD}.")[0])
        _put(model, name, _read(where, key), device_of(linear), source)


def _put(model: nn.Module, name: str, value: Tensor, device: torch.device, source: str) -> Tensor:
    """Gives one of our tensors its numbers; returns it as it was without."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    empty: Tensor = getattr(owner, leaf)
    if value.shape != empty.shape:
        raise BrokenFolder(
            f"{source}: {name} is {tuple(value.shape)}, expected {tuple(empty.shape)}"
        )
    place = torch.device("cpu") if device.type == "meta" else device
    real = value.to(place, empty.dtype, copy=True)  # it may be the caller's own
    setattr(owner, leaf, nn.Parameter(real) if isinstance(empty, nn.Parameter) else real)
    return empty


def _mark_loaded(model: nn.Module) -> None:
    """Marks our tensors as loaded: transformers draws every tensor without its mark anew."""
    for module in model.modules():
        if isinstance(module, GraftedFFN | HostExperts | InputThreshold):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def _read(where: Path | Tensor, key: str) -> Tensor:
    if isinstance(where, Tensor):
        return where
    with safe_open(where, framework="pt") as file:
        return file.get_tensor(key)


def _entry(file: Path, key: str, tensor: Tensor) -> dict[str, str]:
    """A line of accelerate's index of what stays on disk."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"safetensors_file": str(file), "weight_name": key, "dtype": dtype}


def _rename_offloaded(model: nn.Module, offloaded: dict[str, Any]) -> None:
    """Renames entries of accelerate's index where our modules call the host's linears otherwise."""
    renames = [pair for ffn in expert_ffns(model) for pair in ffn.renames.items()]
    for ours, host in renames:
        for key in [key for key in offloaded if key.startswith(host)]:
            offloaded[ours + key.removeprefix(host)] = offloaded.pop(key)
