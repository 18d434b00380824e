"""Draws every progress bar of this package in one way."""

import logging

from tqdm import tqdm

logger = logging.getLogger("moe_tools")


def progress(what: str, total: int | None, unit: str) -> tqdm:
    """A bar on a terminal; nothing in a pipe, or when logging is quieter than warnings."""
    # tqdm reads None as "only on a terminal".
    hidden = None if logger.isEnabledFor(logging.WARNING) else True
    scale = unit == "token"
    return tqdm(desc=what, total=total, unit=f" {unit}s", unit_scale=scale, disable=hidden)
