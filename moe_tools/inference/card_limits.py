"""What `make gpu` measured on a card here: kept for this user, and read by `optimize`.

`$XDG_CACHE_HOME/moe_tools/cards.json` is a table of `kernels.triton.limits`; the package may bring
another (`kernels/triton/tuned.json`). `MOE_TOOLS_LIMITS=built-in` leaves the user's unread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import suppress

from moe_tools.cached import cache_file, write_cache
from moe_tools.inference.measured_limits import VARIABLE
from moe_tools.kernels.triton import limits
from moe_tools.kernels.triton.limits import Entry

FILE = "cards.json"

_log = logging.getLogger(__name__)


def use_known_cards() -> None:
    """Puts the user's table in force, if there is one; a file that cannot be read is named."""
    path = cache_file(FILE)
    if os.environ.get(VARIABLE) == "built-in" or not path.exists():
        return
    try:
        limits.put_in_force(limits.read(path))
    except (OSError, ValueError) as error:
        _log.warning("%s: run `make gpu` again, or remove it", error)


def keep(entries: Iterable[Entry]) -> None:
    """Adds what was measured to the user's table; where nothing can be written, it is not kept."""
    known: list[Entry] = []
    with suppress(OSError, ValueError):
        known = limits.read(cache_file(FILE))
    with suppress(OSError):
        write_cache(cache_file(FILE), limits.written(limits.merged(known, entries)))
