"""The dense model of a converted folder's weights, as a folder without anything of ours.

A converted folder is a dense one already, for transformers. Other programs may take our `router.*`
tensors for their own: converters to GGUF read them as the gate of an MoE, or stop at them.
"""

from __future__ import annotations

import logging
from pathlib import Path

from moe_tools.checkpoint.loading import load, load_tokenizer
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import read_conversion

logger = logging.getLogger(__name__)


def export_dense(source: str, output: Path) -> None:
    """Writes a plain Hugging Face folder: every neuron runs, for every token.

    Raises:
        ValueError: an activation that no stock class computes: as a dense folder, it would be
            another model.
    """
    model = load(source, routed=False)
    conversion = read_conversion(model)
    if conversion is not None:
        if conversion.stock_activation is not None:
            assert conversion.activation is not None
            raise ValueError(
                f"{source} has the activation {conversion.activation['kind']}, which no stock "
                "class computes: it cannot be a plain dense folder"
            )
        del model.config.moe_tools
        if conversion.donor != source:
            logger.info("%s: the dense model of the same weights; no router comes along", output)
    try:
        tokenizer = load_tokenizer(source)
    except ValueError:
        tokenizer = None
    save(model, output, tokenizer)
