"""Appends a token to a key-value cache in place.

transformers' own `DynamicLayer` copies the whole cache for every token. This one leaves room behind
the last position, and copies when that is full: a handful of times.

Letters: B sequences, L layers, K heads of keys and values, W numbers of a head, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from moe_tools.kernels.cpu.memory import HUGE_PAGE, allocate

LEAST = 64
"""Positions of room; half of those in use where that is more."""


@dataclass
class Room:
    """Keys and values with room behind them, and the views of what is in use."""

    all_keys_BKSW: Tensor
    all_values_BKSW: Tensor
    keys_BKSW: Tensor
    values_BKSW: Tensor

    def serves(self, layer: DynamicLayer) -> bool:
        """Whether the layer still holds these views, with a free position behind them.

        Whoever cropped, reordered or replaced them gets a copy, so that nobody who holds an older
        view sees it change.
        """
        return (
            layer.keys is self.keys_BKSW
            and layer.values is self.values_BKSW
            and self.keys_BKSW.shape[2] < self.all_keys_BKSW.shape[2]
            and (torch.is_inference_mode_enabled() or not self.all_keys_BKSW.is_inference())
        )

    def takes(self, k_BK1W: Tensor) -> bool:
        """Whether a new position is of as many sequences, and of the same dtype."""
        return len(k_BK1W) == len(self.keys_BKSW) and k_BK1W.dtype == self.keys_BKSW.dtype

    @property
    def used(self) -> int:
        """Positions in use."""
        return self.keys_BKSW.shape[2]

    def take(self, layer: DynamicLayer) -> None:
        """Counts the first free position among those in use."""
        used = self.used + 1
        layer.keys = self.keys_BKSW = self.all_keys_BKSW[:, :, :used]
        layer.values = self.values_BKSW = self.all_values_BKSW[:, :, :used]


def room_in(layer: DynamicLayer) -> Room | None:
    """Returns the room of a layer, with a free position at least; None where nothing is cached."""
    keys, values = layer.keys, layer.values
    if not layer.is_initialized or keys is None or values is None or keys.numel() == 0:
        return None
    room: Room | None = layer.__dict__.get("_room")
    if room is None or not room.serves(layer):
        room = layer.__dict__["_room"] = Room(_roomy(keys), _roomy(values), keys, values)
    return room


def append(layer: DynamicLayer, k_BK1W: Tensor, v_BK1W: Tensor) -> tuple[Tensor, Tensor]:
    """Does what `layer.update` does for one new position: returns all keys and values."""
    room = room_in(layer)
    if room is None or not room.takes(k_BK1W):
        return layer.update(k_BK1W, v_BK1W)  # which raises, or makes a wider cache
    used = room.used
    room.all_keys_BKSW[:, :, used : used + 1] = k_BK1W
    room.all_values_BKSW[:, :, used : used + 1] = v_BK1W
    room.take(layer)
    return room.keys_BKSW, room.values_BKSW


def _roomy(used_BKSW: Tensor) -> Tensor:
    batch, heads, positions, head = used_BKSW.shape
    made = used_BKSW.new_empty((batch, heads, positions + _more(positions), head))
    made[:, :, :positions] = used_BKSW
    return made


def _more(positions: int) -> int:
    return max(LEAST, positions // 2)


@dataclass
class SharedRoom:
    """Keys and values of layers that are alike, in one memory, and the views of what is in use.

    On huge pages where it is large: a token reads a little of every layer, and would look up as
    many pages of 4 KB.
    """

    all_2LBKSW: Tensor
    views: list[Tensor]
    """What the layers hold: keys of every layer, then values."""
    used: int
    """Positions in use."""

    def serves(self, layers: Sequence[DynamicLayer]) -> bool:
        """Whether the layers still hold these views, with a free position behind them."""
        if self.used == self.all_2LBKSW.shape[4]:
            return False
        if not torch.is_inference_mode_enabled() and self.all_2LBKSW.is_inference():
            return False
        held = _held(layers)
        return len(held) == len(self.views) and all(
            one is other for one, other in zip(held, self.views, strict=True)
        )

    def take(self, layers: Sequence[DynamicLayer]) -> None:
        """Counts the first free position among those in use."""
        self.used += 1
        self._hand_out(layers)

    @classmethod
    def of(cls, layers: Sequence[DynamicLayer]) -> SharedRoom:
        """Moves what the layers hold, which are alike, to where there is room behind it."""
        held = _held(layers)
        batch, heads, used, head = held[0].shape
        shape = (2, len(layers), batch, heads, used + _more(used), head)
        made = cls(_allocated(shape, held[0].dtype), [], used)
        for view, part in zip(made._in_use().flatten(0, 1), held, strict=True):
            view.copy_(part)
        made._hand_out(layers)
        return made

    def _hand_out(self, layers: Sequence[DynamicLayer]) -> None:
        self.views = list(self._in_use().flatten(0, 1).unbind())
        count = len(layers)
        for index, layer in enumerate(layers):
            layer.keys, layer.values = self.views[index], self.views[count + index]

    def _in_use(self) -> Tensor:
        return self.all_2LBKSW[..., : self.used, :]


def shared_room(cache: DynamicCache, count: int) -> SharedRoom | None:
    """Returns the room of the first layers of a cache, with a free position at least.

    None where they are not alike, or hold nothing.
    """
    layers = cast("list[DynamicLayer]", cache.layers[:count])
    room: SharedRoom | None = cache.__dict__.get("_shared_room")
    if room is not None and room.serves(layers):
        return room
    if len(layers) < count or not _are_alike(layers):
        return None
    room = cache.__dict__["_shared_room"] = SharedRoom.of(layers)
    return room


def _are_alike(layers: Sequence[DynamicLayer]) -> bool:
    if any(type(layer) is not DynamicLayer or not layer.is_initialized for layer in layers):
        return False
    held = _held(layers)
    like = held[0]
    return (
        like is not None
        and like.numel() > 0
        and like.is_cpu
        and all(one.shape == like.shape and one.dtype == like.dtype for one in held)
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in held))
    )


def _held(layers: Sequence[DynamicLayer]) -> list[Tensor]:
    keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
    return cast("list[Tensor]", keys + values)


def _allocated(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    return allocate((size,)).view(dtype).view(shape)
