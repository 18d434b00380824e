"""The dense model of a converted folder's weights, as a folder without anything of ours.

Other programs refuse a converted folder, or take our `router.*` tensors for their own. An
activation that was swapped stays written down, and with it the class name that they refuse: most of
them compute the stock activation of a family, whatever the config says.
"""

from __future__ import annotations

import logging
from pathlib import Path

from moe_tools.checkpoint.loading import load, load_tokenizer, read_config
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import (
    Conversion,
    read_block,
    read_conversion,
    write_conversion,
)

logger = logging.getLogger(__name__)


def export_dense(source: str, output: Path) -> None:
    """Writes a plain Hugging Face folder: every neuron runs, for every token.

    Raises:
        ValueError: an activation that no stock class computes, or constants that none adds: as a
            dense folder, it would be another model.
    """
    model = load(source, routed=False)
    _check_constants(source)
    conversion = read_conversion(model)
    if conversion is not None:
        write_conversion(model, _dense(conversion, source))
        if conversion.donor != source:
            logger.info("%s: the dense model of the same weights; no router comes along", output)
    try:
        tokenizer = load_tokenizer(source)
    except ValueError:
        tokenizer = None
    save(model, output, tokenizer)


def _check_constants(source: str) -> None:
    block = None if Path(source).suffix == ".gguf" else read_block(read_config(source))
    if block is not None and block.constants:
        raise ValueError(
            f"{source} was refitted to the masks of its routers, with constants that no stock "
            "class adds: export the folder from before `refit`, or refit with `constants: false`"
        )


def _dense(conversion: Conversion, source: str) -> Conversion | None:
    """What is left to say about a model without routers and experts: its activation, if any."""
    if conversion.activation is None:
        return None
    kind = conversion.activation["kind"]
    if conversion.stock_activation is not None:
        raise ValueError(
            f"{source} has the activation {kind}, which no stock "
            "class computes: it cannot be a plain dense folder"
        )
    logger.warning(
        "the folder says that its activation is %s: transformers computes it; llama.cpp, vLLM and "
        "others refuse the folder by its class name, as they may compute another one",
        kind,
    )
    return Conversion(
        conversion.donor, activation=conversion.activation, layouts=conversion.layouts
    )
