"""Files that may be made again: in `$XDG_CACHE_HOME/moe_tools`, by default below `~/.cache`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_file(name: str) -> Path:
    """Where a file is kept; the standard of the variable says to ignore a relative path."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    base = base if base.is_absolute() else Path("~/.cache").expanduser()
    return base / "moe_tools" / name


def write_cache(path: Path, text: str) -> None:
    """Writes a file that is complete or not there at all.

    Raises:
        OSError: nothing can be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
