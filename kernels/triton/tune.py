"""Finds tile sizes by trial, on the GPU at hand."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from triton.testing import do_bench

from moe_tools.kernels.triton.config import Config, candidates
from moe_tools.kernels.triton.ffn import sparse_ffn_triton
from moe_tools.kernels.weights import FFNWeights


def tune(
    weights: FFNWeights,
    x_TD: Tensor,
    mask_TE: Tensor | None = None,
    *,
    gate_first: bool | None = None,
    milliseconds: Callable[[Callable[[], Tensor]], float] = do_bench,
) -> Config:
    """Returns the tile sizes with which `sparse_ffn_triton` is fastest; of equals, the pinned ones.

    Worth doing once for each width, expert size and number of tokens; keep the result and pass it
    as `config`. Give a mask as sparse as those that will come: the best tiles depend on it.

    Args:
        weights: of one FFN.
        x_TD: an input with as many tokens as those that will come.
        mask_TE: which experts run.
        gate_first: as in `sparse_ffn_triton`.
        milliseconds: how long a call takes.

    Raises:
        ValueError: as `sparse_ffn_triton`.
    """

    def time(config: Config) -> float:
        return milliseconds(
            lambda: sparse_ffn_triton(weights, x_TD, mask_TE, gate_first=gate_first, config=config)
        )

    return min(candidates(x_TD.numel() // weights.width), key=time)
