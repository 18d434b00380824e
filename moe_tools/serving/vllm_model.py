"""A converted model in vLLM: its attention, cache and scheduler, and our FFNs.

vLLM runs models of transformers through its Transformers backend, which builds the host and puts
its own modules in place of linears, norms and attention. Ours go in before that, and stay out of
its sight meanwhile: it would shard the linears of an FFN, repack their weights and then drop them,
while routers and kernels of ours read them.

Only vLLM imports this module, by the path in `vllm_plugin`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.transformers import TransformersForCausalLM

from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.rebuild import add_modules, of_base
from moe_tools.checkpoint.stored import some
from moe_tools.experts.conversion import write_conversion
from moe_tools.hosts.ffn import find_ffns, grafted_ffns
from moe_tools.inference.optimized import optimize
from moe_tools.serving.vllm_options import Options, checked_conversion, read_options


class MoeToolsForCausalLM(TransformersForCausalLM):
    """A model of vLLM, made of a host of transformers and the FFNs of a converted folder."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        self._conversion = checked_conversion(vllm_config)
        self._options: Options = read_options(vllm_config.additional_config)
        self._loaded = False
        self._ours: dict[str, tuple[str, str]] = {}
        """Name of a tensor of ours, in a folder -> the module below `model` that has it, and its
        name there."""
        with transformers_patched(True):  # activations that only we know get a stand-in
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    def recursive_replace(self) -> None:
        """Puts our modules into the host, then lets vLLM replace what is not ours."""
        conversion = of_base(self.model, self._conversion)
        write_conversion(self.model, conversion)
        with torch.device("meta"):
            add_modules(self.model, conversion)
        _check_host(self.model)
        self._ours = dict(_named(self.model))
        for path, leaf in self._ours.values():
            _give_memory(self.model.get_submodule(path), leaf, self.device_config.device)
        with _out_of_sight(self.model):
            super().recursive_replace()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads every tensor of the folder, ours too, and packs the FFNs where that was asked for.

        Raises:
            ValueError: a tensor of ours is missing, or has another shape.
        """
        found: set[str] = set()
        loaded = super().load_weights(self._without_ours(weights, found))
        if missing := set(self._ours) - found:
            raise ValueError(f"{self.model_config.model} lacks the tensors {some(missing)}")
        self._loaded = True
        if self._options.optimize:
            self.eval()
            optimize(self.model, dtype=self._options.dtype)
        return loaded | {f"model.{path}.{leaf}" for path, leaf in self._ours.values()}

    def process_weights_after_loading(self) -> None:
        """vLLM calls it last.

        Raises:
            ValueError: it loaded the model in a way that does not know of our tensors.
        """
        if not self._loaded:
            raise ValueError(
                f"--load-format {self.vllm_config.load_config.load_format} does not give "
                f"{self.model_config.model} the tensors of its routers: leave it away"
            )

    def _without_ours(
        self, weights: Iterable[tuple[str, Tensor]], found: set[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Takes our tensors out of those of a folder, and notes which; the host's go on."""
        above = f"{self.model.base_model_prefix}."
        pairs = [pair for ffn in grafted_ffns(self.model) for pair in ffn.renames.items()]
        renames = {host: ours for ours, host in pairs}
        for name, value in weights:
            key = name.removeprefix(above)
            if key in self._ours:
                path, leaf = self._ours[key]
                _fill(getattr(self.model.get_submodule(path), leaf), value, name)
                found.add(key)
                continue
            host = next((host for host in renames if key.startswith(host)), None)
            yield name if host is None else above + renames[host] + key.removeprefix(host), value


def _named(model: nn.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """Our tensors by their names in a folder, see `MoeToolsForCausalLM._ours`."""
    for ffn in grafted_ffns(model):
        for key in ffn.added():
            path, _, leaf = f"{ffn.name}.{key}".rpartition(".")
            yield f"{ffn.name}.{key}", (path, leaf)


def _give_memory(owner: nn.Module, leaf: str, device: torch.device) -> None:
    """Gives a tensor that is a shape so far its memory, in the dtype that moe-tools keeps it in."""
    shape: Tensor = getattr(owner, leaf)
    real = torch.empty_like(shape, device=device)
    is_parameter = isinstance(shape, nn.Parameter)
    setattr(owner, leaf, nn.Parameter(real, requires_grad=False) if is_parameter else real)


@torch.no_grad()
def _fill(ours: Tensor, value: Tensor, name: str) -> None:
    if ours.shape != value.shape:
        raise ValueError(f"{name} is {tuple(value.shape)}, expected {tuple(ours.shape)}")
    ours.copy_(value)


def _check_host(model: nn.Module) -> None:
    """Whether what is in a host now can run without the code of transformers' own linears.

    Raises:
        ValueError: only the host computes its hidden activations, or a tensor of a router is in no
            folder.
    """
    for ffn in grafted_ffns(model):
        if ffn.layout.masked:
            raise ValueError(
                f"{ffn.name}: only its host knows how it computes its neurons, which vLLM cannot "
                "run routed: use moe_tools.load and transformers"
            )
        known = set(ffn.added())
        shapes = [name for name, one in ffn.named_buffers() if one.is_meta]
        if left := [name for name in shapes if name not in known and name.startswith("router.")]:
            raise ValueError(f"{ffn.name}: {some(left)} of its router is in no folder")


@contextmanager
def _out_of_sight(model: nn.Module) -> Iterator[None]:
    """While it lasts, an empty module stands in the place of every FFN that is ours in any part."""
    paths = [path for ffn in _ffns(model) for path in (ffn.name, *ffn.also)]
    kept = [(path, model.get_submodule(path)) for path in paths]
    for path, _ in kept:
        model.set_submodule(path, nn.Identity())
    try:
        yield
    finally:
        for path, module in kept:
            model.set_submodule(path, module)


def _ffns(model: nn.Module) -> list[Any]:
    """The FFNs whose place is their own: routed ones, or the dense ones of a swapped model."""
    routed = [ffn for ffn in grafted_ffns(model) if ffn.done is not None]
    return routed or [ffn for ffn in find_ffns(model) if not ffn.layout.slot]
