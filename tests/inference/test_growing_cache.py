"""A cache that grows in place holds what transformers' own holds, after any calls."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from moe_tools.inference.growing_cache import LEAST, append, shared_room

HEADS, HEAD = 2, 3


class Pair:
    """Our layer and transformers' own, and every view that was given out so far."""

    def __init__(self) -> None:
        self.ours, self.theirs = DynamicLayer(), DynamicLayer()
        self.seen: list[tuple[Tensor, Tensor]] = []

    @property
    def batch(self) -> int:
        keys = self.theirs.keys
        return 2 if keys is None or keys.numel() == 0 else len(keys)

    @property
    def length(self) -> int:
        return int(self.theirs.get_seq_length())

    def new(self, tokens: int) -> tuple[Tensor, Tensor]:
        k, v = torch.randn(2, self.batch, HEADS, tokens, HEAD)
        return k, v

    def append(self, tokens: int) -> None:
        """One by one."""
        for _ in range(tokens):
            k, v = self.new(1)
            self.see(append(self.ours, k, v), self.theirs.update(k, v))

    def update(self, tokens: int) -> None:
        k, v = self.new(tokens)
        self.see(self.ours.update(k, v), self.theirs.update(k, v))

    def crop(self, tokens: int) -> None:
        for layer in (self.ours, self.theirs):
            layer.crop(-min(tokens, self.length - 1))

    def reorder(self, seed: int) -> None:
        order = torch.randint(
            self.batch, (self.batch,), generator=torch.Generator().manual_seed(seed)
        )
        for layer in (self.ours, self.theirs):
            layer.reorder_cache(order)

    def repeat(self, _: int) -> None:
        for layer in (self.ours, self.theirs):
            layer.batch_repeat_interleave(2 if self.batch < 4 else 1)

    def select(self, _: int) -> None:
        for layer in (self.ours, self.theirs):
            layer.batch_select_indices(torch.tensor([0, -1]))

    def reset(self, _: int) -> None:
        for layer in (self.ours, self.theirs):
            layer.reset()

    def deepcopy(self, _: int) -> None:
        """Goes on with the copy; the original goes its own way."""
        left, self.ours = self.ours, copy.deepcopy(self.ours)
        append(left, *self.new(1))

    def copy(self, _: int) -> None:
        left, self.ours = self.ours, copy.copy(self.ours)
        append(left, *self.new(1))

    def pickle(self, _: int) -> None:
        self.ours = pickle.loads(pickle.dumps(self.ours))

    def hand_over(self, _: int) -> None:
        """To another layer, which then holds the same tensors."""
        made, left = DynamicLayer(), self.ours
        if left.keys is not None and left.values is not None:
            made.lazy_initialization(left.keys, left.values)
            made.keys, made.values = left.keys, left.values
            self.ours = made
            append(left, *self.new(1))

    def see(self, ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
            self.seen.append((one, one.clone()))

    def check(self) -> None:
        assert self.ours.get_seq_length() == self.theirs.get_seq_length()
        for one, other in (
            (self.ours.keys, self.theirs.keys),
            (self.ours.values, self.theirs.values),
        ):
            assert (one is None and other is None) or torch.equal(one, other)
        assert all(torch.equal(view, before) for view, before in self.seen)


CALLS = ("append", "update", "crop", "reorder", "repeat", "select", "reset", "deepcopy", "copy")
CALLS += ("pickle", "hand_over")
NEED_SOME = ("crop", "select", "deepcopy", "copy", "hand_over")
"""Where there is nothing yet, these have nothing to show."""


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(CALLS) | st.just("append"),
            st.integers(1, 4) | st.just(LEAST + 2),
            st.booleans(),
        ),
        max_size=14,
    )
)
def test_after_any_calls_it_holds_what_transformers_own_holds(
    calls: list[tuple[str, int, bool]],
) -> None:
    torch.manual_seed(0)
    pair = Pair()
    for name, number, inference in calls:
        if name in NEED_SOME and pair.length == 0:
            continue
        inference = inference and name != "pickle"
        with torch.inference_mode(inference), torch.no_grad():
            getattr(pair, name)(number)
            pair.check()


def test_tokens_are_written_in_place() -> None:
    layer = DynamicLayer()
    layer.update(*torch.randn(2, 1, HEADS, 3, HEAD))
    places = set()
    for _ in range(LEAST):
        keys, values = append(layer, *torch.randn(2, 1, HEADS, 1, HEAD))
        assert keys is layer.keys and values is layer.values
        places.add(keys.data_ptr())
    assert len(places) == 1


def test_long_caches_get_half_as_much_room() -> None:
    layer = DynamicLayer()
    layer.update(*torch.randn(2, 1, HEADS, 4 * LEAST, HEAD))
    places = {append(layer, *torch.randn(2, 1, HEADS, 1, HEAD))[0].data_ptr() for _ in range(300)}
    assert len(places) <= 3


def test_what_was_made_in_inference_mode_is_not_written_to_outside() -> None:
    layer = DynamicLayer()
    with torch.inference_mode():
        layer.update(*torch.randn(2, 1, HEADS, 3, HEAD))
        before, _ = append(layer, *torch.randn(2, 1, HEADS, 1, HEAD))
    keys, _ = append(layer, *torch.randn(2, 1, HEADS, 1, HEAD))
    assert not keys.is_inference() and keys.data_ptr() != before.data_ptr()
    again, _ = append(layer, *torch.randn(2, 1, HEADS, 1, HEAD))
    assert again.data_ptr() == keys.data_ptr()
    assert torch.equal(again[:, :, :4], before)


def test_another_batch_is_the_error_that_it_was() -> None:
    for batch in (1, 3):
        layer = DynamicLayer()
        layer.update(*torch.randn(2, 2, HEADS, 3, HEAD))
        append(layer, *torch.randn(2, 2, HEADS, 1, HEAD))
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            append(layer, *torch.randn(2, batch, HEADS, 1, HEAD))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_widens_as_it_did(dtype: torch.dtype) -> None:
    pair = Pair()
    pair.append(3)
    k, v = (part.to(dtype) for part in pair.new(1))
    pair.see(append(pair.ours, k, v), pair.theirs.update(k, v))
    assert pair.ours.keys is not None and pair.theirs.keys is not None
    assert pair.ours.keys.dtype == pair.theirs.keys.dtype
    pair.append(2)
    pair.check()


# --- layers that share their memory ---------------------------------------------------------------

LAYERS = 3


class CachePair:
    """Our cache and transformers' own, and every view that was given out so far."""

    def __init__(self) -> None:
        self.ours, self.theirs = DynamicCache(), DynamicCache()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.update(3)

    def new(self, tokens: int) -> list[tuple[Tensor, Tensor]]:
        batch = len(self.theirs.layers[0].keys) if self.theirs.layers else 2  # type: ignore[arg-type]
        return [tuple(torch.randn(2, batch, HEADS, tokens, HEAD)) for _ in range(LAYERS)]  # type: ignore[misc]

    def append(self, tokens: int) -> None:
        for _ in range(tokens):
            made = self.new(1)
            put(self.ours, made)
            for index, (k, v) in enumerate(made):
                self.theirs.update(k, v, index)

    def update(self, tokens: int) -> None:
        for index, (k, v) in enumerate(self.new(tokens)):
            for cache in (self.ours, self.theirs):
                cache.update(k, v, index)

    def crop(self, tokens: int) -> None:
        for cache in (self.ours, self.theirs):
            cache.crop(-min(tokens, cache.get_seq_length() - 1))

    def crop_one(self, _: int) -> None:
        """Layers that are no longer alike are nobody's shared memory."""
        for cache in (self.ours, self.theirs):
            cache.layers[1].crop(-1)
        assert self.theirs.get_seq_length() == 1 or shared_room(self.ours, LAYERS) is None
        (k, v), *_ = self.new(1)
        for cache in (self.ours, self.theirs):
            cache.layers[1].update(k, v)

    def repeat(self, _: int) -> None:
        for cache in (self.ours, self.theirs):
            cache.batch_repeat_interleave(2 if len(self.theirs.layers[0].keys) < 4 else 1)  # type: ignore[arg-type]

    def deepcopy(self, _: int) -> None:
        left, self.ours = self.ours, copy.deepcopy(self.ours)
        put(left, self.new(1))

    def copy(self, _: int) -> None:
        """As whoever keeps a prompt's cache for the next text does."""
        left, self.ours = self.ours, copy.copy(self.ours)
        self.ours.layers = [copy.copy(layer) for layer in left.layers]
        put(left, self.new(1))

    def pickle(self, _: int) -> None:
        self.ours = pickle.loads(pickle.dumps(self.ours))

    def check(self) -> None:
        for one, other in zip(self.ours.layers, self.theirs.layers, strict=True):
            for name in ("keys", "values"):
                ours = getattr(one, name)
                assert torch.equal(ours, getattr(other, name))
                self.seen.append((ours, ours.clone()))
        assert all(torch.equal(view, before) for view, before in self.seen)


def put(cache: DynamicCache, made: list[tuple[Tensor, Tensor]]) -> None:
    """Writes a new position of every layer, as the kernels do."""
    room = shared_room(cache, LAYERS)
    assert room is not None
    for index, (k, v) in enumerate(made):
        room.all_2LBKSW[0, index, :, :, room.used] = k[:, :, 0]
        room.all_2LBKSW[1, index, :, :, room.used] = v[:, :, 0]
    room.take(cache.layers)


SHARED = ("append", "update", "crop", "crop_one", "repeat", "deepcopy", "copy", "pickle")


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(SHARED) | st.just("append"),
            st.integers(1, 4) | st.just(LEAST + 2),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_a_shared_room_holds_what_transformers_own_cache_holds(
    calls: list[tuple[str, int, bool]],
) -> None:
    torch.manual_seed(0)
    pair = CachePair()
    for name, number, inference in calls:
        inference = inference and name != "pickle"
        with torch.inference_mode(inference), torch.no_grad():
            getattr(pair, name)(number)
            pair.check()


def test_a_shared_room_is_written_in_place() -> None:
    pair, places = CachePair(), set()
    for _ in range(LEAST):
        pair.append(1)
        places.add(pair.ours.layers[0].keys.data_ptr())  # type: ignore[union-attr]
    assert len(places) == 1
