"""Appends a token to a key-value cache in place.

transformers' own `DynamicLayer` copies the whole cache for every token. This one leaves room behind
the last position, and copies when that is full: a handful of times.

Letters: B sequences, K heads of keys and values, W numbers of a head, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

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
    more = max(LEAST, positions // 2)
    made = used_BKSW.new_empty((batch, heads, positions + more, head))
    made[:, :, :positions] = used_BKSW
    return made
