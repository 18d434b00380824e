"""Converted models in the formats of other programs: a format is a function, a file each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_tools.checkpoint.atomic import check_free
from moe_tools.export.dense import export_dense
from moe_tools.registry import Registry

Format = Callable[[str, Path], None]
"""Writes the model of a folder, hub id or GGUF file to a path that is free; refuses, with a
ValueError, what the format cannot say."""

FORMATS: Registry[Format] = Registry("export format", {"dense": export_dense})


def export(source: str | Path, output: str | Path, *, format: str = "dense") -> Path:
    """Writes a model in another program's format.

    Args:
        source: folder, hub id or GGUF file.
        output: where to; nothing that is there is overwritten.
        format: a name in `FORMATS`.

    Returns:
        `output`.

    Raises:
        ValueError: an unknown format, an output that exists, or a model that the format cannot say.
    """
    write = FORMATS[format]
    check_free(output)
    write(str(source), Path(output))
    return Path(output)
