"""Launches and grids, from shapes alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moe_tools.kernels.triton.call import Call
from moe_tools.kernels.triton.config import (
    Config,
    candidates,
    pinned,
    tokens_of_a_program,
)
from moe_tools.kernels.triton.launches import backward_launches, forward_launches


def call(
    tokens: int,
    *,
    gated: bool = True,
    act: str = "silu",
    gate_first: bool = False,
    mask: torch.dtype = torch.float32,
) -> Call:
    """A call without data: whatever the launches read of it is shape."""
    width, neurons, experts = 64, 256, 32
    return Call(
        x_TD=torch.empty(tokens, width, device="meta"),
        gate_FD=torch.empty(neurons, width, device="meta"),
        up_FD=torch.empty(neurons, width, device="meta") if gated else None,
        down_FD=torch.empty(neurons, width, device="meta"),
        mask_TE=torch.empty(tokens, experts, dtype=mask, device="meta"),
        act=act,
        gate_first=gate_first,
    )


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_an_ffn_is_three_launches(tokens: int, gate_first: bool, gated: bool) -> None:
    act = "relu" if gate_first else "silu"
    launches, y_TD = forward_launches(call(tokens, gated=gated, act=act, gate_first=gate_first))
    first = "list_firing" if gate_first else "list_experts"
    assert [launch.name for launch in launches] == [first, "compute_hidden", "combine"]
    assert y_TD.shape == (tokens, 64)


def test_amd_adds_the_shares_in_a_launch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    launches, _ = forward_launches(call(1))
    assert [launch.name for launch in launches[2:]] == ["combine", "add_shares"]


def test_the_backward_pass_is_four_launches_and_one_for_the_mask() -> None:
    made = call(2)
    launches, grads = backward_launches(made, torch.empty_like(made.x_TD))
    assert len(launches) == 5
    assert grads.mask_TE is not None and grads.mask_TE.shape == (2, 32)
    hard = call(2, mask=torch.bool)
    launches, grads = backward_launches(hard, torch.empty_like(hard.x_TD))
    assert len(launches) == 4 and grads.mask_TE is None


@pytest.mark.parametrize(
    ("tokens", "together"), [(1, 1), (2, 16), (16, 16), (17, 32), (33, 64), (500, 64)]
)
def test_tokens_share_a_program(tokens: int, together: int) -> None:
    assert tokens_of_a_program(tokens) == together
    launches, _ = forward_launches(call(tokens))
    assert [launch.grid[-1] for launch in launches] == [-(-tokens // together)] * 3


@pytest.mark.parametrize("tokens", [1, 16])
def test_candidates_begin_with_the_pinned_and_differ(tokens: int) -> None:
    tried = candidates(tokens)
    assert tried[0] == pinned(tokens)
    assert len(set(tried)) == len(tried) > 4


def test_tiles_are_fitted_to_the_width() -> None:
    assert pinned(1).fitted(1, 5).columns == 8
    assert pinned(16).fitted(16, 5).columns == 16
    assert pinned(1).fitted(1, 4096) == pinned(1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((12, 16, 4, 16, 8, 16, 2, 4), r"^tile sizes \[12\] of Config.*are powers of two$"),
        ((16, 8, 16, 16, 8, 16, 2, 4), "rows divide tile and gate_tile$"),
    ],
    ids=["power", "rows"],
)
def test_tiles_that_do_not_fit_are_named(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(*sizes)
