"""What stands in an exported folder beside its weights: config, tokenizer, licence, card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.card import write_card
from moe_tools.checkpoint.companions import companions, put_beside
from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.experts.conversion import Conversion, write_block
from moe_tools.export.source import Source


def write_around(
    source: Source,
    config: Any,
    kept: Conversion | None,
    dtype: torch.dtype | None,
    place: Path,
) -> None:
    """Writes all but the weights.

    Args:
        source: what is exported.
        config: of the model that is written.
        kept: the block that it has; None: none.
        dtype: of the weights; None: as the config says.
        place: the folder.
    """
    write_block(config, kept)
    if dtype is not None:
        config.dtype = dtype
    with quiet_transformers(), transformers_patched(True):
        config.save_pretrained(place)
    put_beside(companions(source.name), place)
    for code in source.folder.glob("*.py"):  # of a model that brings its own
        shutil.copyfile(code, place / code.name)
    write_card(place)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another dtype, if it has floats; None: as it is."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
