"""The weights of a model as they are while it trains, in one safetensors file and back.

`safetensors.torch.save_model` does the same, but refuses tensors that are a part of a storage: the
experts of an MoE host are, once taken apart (`moe_tools.hosts.moe_host`).
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_weights(model: nn.Module, file: Path) -> None:
    """Saves every tensor of the state dict; one of several names goes under the first of them."""
    state = model.state_dict()
    save_file({name: state[name].contiguous() for name in _first_names(state).values()}, file)


def load_weights(model: nn.Module, file: Path) -> None:
    """Loads what `save_weights` saved into a model of the same tensors.

    Raises:
        ValueError: a tensor is missing, or one is there that the model has not.
    """
    first = set(_first_names(model.state_dict()).values())
    stored = load_file(file)
    if stored.keys() != first:
        wrong = ", ".join(sorted(stored.keys() ^ first)[:3])
        raise ValueError(f"{file} is of another model: they differ in {wrong}")
    model.load_state_dict(stored, strict=False)  # the other names of a tensor are left out


def _first_names(state: dict[str, Tensor]) -> dict[tuple[int, int], str]:
    """Maps where a tensor starts, and how many numbers it has, to the first of its names."""
    names: dict[tuple[int, int], str] = {}
    for name, tensor in state.items():
        names.setdefault((tensor.data_ptr(), tensor.numel()), name)
    return names
