"""A model whose weights are shards from the start: no process ever holds all of them.

The model comes empty (`load(..., device="meta")`), so that everything is checked before a weight
is read. It is then filled part by part, first what stands around the layers, then layer by layer:
every process reads the part by all the rules of `moe_tools.checkpoint.loading`, routers and experts
included, keeps its share under ZeRO-3, and lets go of the rest. One part is in memory beside the
shares. DeepSpeed's own way, `zero.Init` around transformers' `from_pretrained`, merges all files in
every process first.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import is_quantised_source, load
from moe_tools.checkpoint.parts import Gap, Part, layer_paths
from moe_tools.hosts.moe_host import HostExperts, unfuse_experts
from moe_tools.steps.launch import Launch
from moe_tools.training import zero

UNKNOWN = ("zero_hpz_partition_size", "zero_quantized_weights")
"""Options of ZeRO-3 under which a share is more than a part of the numbers."""


def why_whole(source: str, launch: Launch) -> str | None:
    """Why each process has to load the whole model first; None: it can be born in shards.

    Args:
        source: of the weights.
        launch: of the train step.
    """
    if launch.zero_stage != 3:
        return "only ZeRO-3 shards weights"
    assert launch.deepspeed is not None
    given = launch.deepspeed["zero_optimization"]
    for option in UNKNOWN:
        if given.get(option, 1) not in (1, False):
            return f"{option} is set"
    if _offload(given).get("device") == "nvme":
        return "weights are offloaded to an NVMe disk"
    if Path(source).suffix == ".gguf":
        return "a GGUF file is read as a whole"
    if is_quantised_source(source):
        return "a quantised model is dequantised as a whole"
    model = load(source, device="meta")
    try:
        layers = layer_paths(model)
    except ValueError as error:
        return str(error)
    shared = _shared(model, layers)
    return None if shared is None else f"its layers share {shared}"


def _offload(given: Any) -> dict[str, Any]:
    """The section on weights in the memory of the CPU."""
    return given.get("offload_param") or {}


def _shared(model: nn.Module, layers: tuple[str, ...]) -> str | None:
    """The name of a parameter that two layers share, or one with what stands around them."""
    seen: dict[int, str | None] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        home = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if seen.setdefault(id(param), home) != home:
            return name
    return None


@contextmanager
def filled(model: PreTrainedModel, source: str, launch: Launch) -> Iterator[None]:
    """Fills a model, and undoes at its end what that changes outside of it; see `fill`."""
    with zero.released():
        fill(model, source, launch)
        yield


@torch.no_grad()
def fill(model: PreTrainedModel, source: str, launch: Launch) -> None:
    """Gives an empty model its weights, in place, each process its share of every one.

    All processes come here together.

    Args:
        model: on the meta device, as `load` makes it; fused experts may be taken apart by now.
        source: the folder or hub id that it was made from, for which `why_whole` says None.
        launch: of the train step.

    Raises:
        ValueError: as `load`, or a weight that is in no part.
    """
    layers, dtype = layer_paths(model), model.dtype
    apart = any(isinstance(module, HostExperts) for module in model.modules())
    for layer in (None, *layers):
        part = load(source, dtype=dtype, part=Part(layers, layer))
        if apart and layer is not None:
            unfuse_experts(part)
        _shard(part, launch, last=layer == layers[-1])
        _hand_over(part, model)
        del part
        gc.collect()  # modules know each other: reference counts do not free a part
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{source}: {name} is in no layer and not around them: use zero2")


def _shard(part: nn.Module, launch: Launch, last: bool) -> None:
    """Divides the parameters of a part over the processes, and moves its buffers to the device.

    With the last part DeepSpeed replaces PyTorch's `linear`, unless its configuration says not to.
    """
    import deepspeed

    assert launch.deepspeed is not None
    given = launch.deepspeed["zero_optimization"]
    offload = _offload(given)
    device = offload.get("device")
    init = deepspeed.zero.Init(
        module=part,
        mem_efficient_linear=last and given.get("memory_efficient_linear", True),
        remote_device=device if device == "cpu" else None,
        pin_memory=bool(offload.get("pin_memory", False)),
        dtype=next(part.parameters()).dtype,
    )
    for module in part.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(init.local_device)


def _hand_over(part: nn.Module, model: nn.Module) -> None:
    """Moves every tensor of a part to its place in the whole model."""
    for path, module in part.named_modules():
        if isinstance(module, Gap):
            continue
        owner = model.get_submodule(path)
        for ours, theirs in (
            (owner._parameters, module._parameters),
            (owner._buffers, module._buffers),
        ):
            ours.update({name: tensor for name, tensor in theirs.items() if tensor is not None})
        plain = {name: value for name, value in vars(module).items() if torch.is_tensor(value)}
        vars(owner).update(plain)  # what a host keeps beside its buffers, e.g. of its positions
