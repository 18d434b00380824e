"""The dense model of a converted folder's weights, as a folder without anything of ours.

Other programs refuse a converted folder, or take our `router.*` tensors for their own. An
activation that was swapped stays written down, and with it the class name that they refuse: most of
them compute the stock activation of a family, whatever the config says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.plain import quantised_by
from moe_tools.checkpoint.rebuild import added_tensors
from moe_tools.experts.conversion import Conversion, write_conversion
from moe_tools.export.folder import cast, write_around
from moe_tools.export.plan import Limits, Options, Plan, Written
from moe_tools.export.shards import SHARD, Group, write_shards
from moe_tools.export.source import Source, StoredTensors
from moe_tools.export.stock import StockModel
from moe_tools.hosts.ffn import host_state_dict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DensePlan(Plan):
    """A stock folder of the same weights."""

    compared = True

    kept: Conversion | None
    """The block that stays: one that names the activation, or none."""
    dtype: torch.dtype | None

    @property
    def weights_dtype(self) -> torch.dtype | None:
        return self.dtype

    @property
    def limits(self) -> Limits | None:
        """The same sums, but for their order."""
        return Limits(1e-4)

    def facts(self) -> dict[str, Any]:
        """The activation, if it is not the donor's."""
        said = {} if self.dtype is None else {"dtype": str(self.dtype).removeprefix("torch.")}
        if self.kept is None or self.kept.activation is None:
            return {"folder": "dense", **said}
        return {"folder": "dense", "activation": self.kept.activation["kind"], **said}

    def write(self, source: Source, place: Path) -> None:
        """Copies what is the host's, tensor by tensor; only a quantised folder is loaded whole."""
        if quantised_by(source.config) is not None:
            model = load(source.name, routed=False, dtype=self.dtype)
            write_conversion(model, self.kept)
            model.save_pretrained(place, state_dict=host_state_dict(model))
            config = model.config
        else:
            stored = source.tensors()
            ours = added_tensors(load(source.name, device="meta"))  # refuses what is incomplete
            write_shards(place, list(_groups(stored, ours, self.dtype)))
            config = source.config
        write_around(source, config, self.kept, self.dtype, place)

    def read_back(self, place: Path, dtype: torch.dtype) -> Written | None:
        """The stock class, which computes every neuron."""
        return StockModel(place, dtype)


def plan_dense(source: Source, options: Options) -> Plan:
    """Plans the dense folder.

    Raises:
        ValueError: an activation that no stock class computes, or constants that none adds: as a
            dense folder, it would be another model; or a folder that moe-tools did not write.
    """
    options.only("dense", "dtype")
    conversion = source.conversion
    if conversion is None:
        raise ValueError(
            f"{source.name} is not converted: it is a dense folder that any program may read"
        )
    if conversion.constants:
        raise ValueError(
            f"{source.name} was refitted to the masks of its routers, with constants that no stock "
            "class adds: export the folder from before `refit`, or refit with `constants: false`"
        )
    return DensePlan(_kept(conversion, source.name), options.dtype)


def _kept(conversion: Conversion, name: str) -> Conversion | None:
    """What is left to say about a model without routers and experts: its activation, if any."""
    if conversion.activation is None:
        return None
    kind = conversion.activation["kind"]
    if conversion.stock_activation is not None:
        raise ValueError(
            f"{name} has the activation {kind}, which no stock class computes: it cannot be a "
            "plain dense folder"
        )
    logger.warning(
        "the folder says that its activation is %s: transformers computes it; llama.cpp, vLLM and "
        "others refuse the folder by its class name, as they may compute another one",
        kind,
    )
    return Conversion(
        conversion.donor, activation=conversion.activation, layouts=conversion.layouts
    )


def _groups(stored: StoredTensors, ours: set[str], dtype: torch.dtype | None) -> Iterator[Group]:
    """The host's tensors, as many at a time as make a shard; a file after the other."""
    names: list[str] = []
    size = 0
    for name in (name for name in stored if name not in ours):
        names.append(name)
        size += stored.nbytes(name, dtype)
        if size >= SHARD:
            yield partial(_read, stored, tuple(names), dtype)
            names, size = [], 0
    if names:
        yield partial(_read, stored, tuple(names), dtype)


def _read(
    stored: StoredTensors, names: tuple[str, ...], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    return {name: cast(stored[name], dtype) for name in names}
