"""Spends a share over the parts of one layer where it costs least error of the layer's output.

As in TEAL (arXiv 2408.14690, algorithm 1): every step saves as much work, at the part where the
error then is smallest. A part is measured again only when its last measurement is the smallest: the
others have become dearer since, not cheaper, as error curves are convex.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moe_tools.hosts.input_threshold import MOST

STEP = 0.05
"""Share of the layer's work that one step saves."""


def greedy_shares(
    work: Mapping[str, float], sparsity: float, error: Callable[[Mapping[str, float]], float]
) -> tuple[dict[str, float], float]:
    """Part -> its share, and the error of all together; never worse than one share for all.

    Args:
        work: part -> what it costs when nothing is saved.
        sparsity: share of the work of all parts to save.
        error: of the layer's output, from the share of every part.
    """
    total = sum(work.values())
    shares, now = dict.fromkeys(work, 0.0), 0.0
    missing = sparsity * total
    stale = dict.fromkeys(work, 0.0)
    """Error per work of the next step, as it was measured last."""
    while missing > 1e-9 * total:
        fresh: dict[str, tuple[float, float]] = {}
        while True:
            part = min(
                (each for each in stale if _room(shares[each])), key=lambda each: stale[each]
            )
            if part in fresh:
                break
            gain = min(STEP * total, missing, (MOST - shares[part]) * work[part])
            after = error({**shares, part: shares[part] + gain / work[part]})
            fresh[part] = gain, after
            stale[part] = (after - now) / gain
        gain, now = fresh[part]
        shares[part] += gain / work[part]
        missing -= gain
    equal = dict.fromkeys(work, sparsity)
    uniform = error(equal)
    return (equal, uniform) if uniform <= now else (shares, now)


def _room(share: float) -> bool:
    return share < MOST - 1e-9
