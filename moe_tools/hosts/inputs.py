"""What a forward pass over text takes.

Letters: B blocks, T tokens of a block, S tokens that a decoder says about it.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from moe_tools.data.batch import Batch
from moe_tools.names import IGNORE


def model_inputs(model: nn.Module, text: Tensor | Batch) -> dict[str, Tensor]:
    """A model's arguments for blocks_BT or a batch.

    An encoder-decoder gets blocks on both sides; of a batch with targets, its decoder gets those,
    moved on by one as it does itself. Types of tokens go to a model that takes them.
    """
    batch = Batch(text) if isinstance(text, Tensor) else text
    inputs = {"input_ids": batch.ids_BT}
    if batch.targets_BS is not None:
        inputs |= _decoder_inputs(model, batch.targets_BS)
    elif model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = batch.ids_BT
    if batch.mask_BT is not None:
        inputs["attention_mask"] = batch.mask_BT.long()
    if batch.positions_BT is not None:
        inputs["position_ids"] = batch.positions_BT
    if batch.types_BT is not None and TYPES in inspect.signature(model.forward).parameters:
        inputs[TYPES] = batch.types_BT
    return inputs


TYPES = "token_type_ids"


def run_layers(model: nn.Module, text: Tensor | Batch) -> None:
    """Runs the layers over text, for hooks to see what passes there.

    Nobody reads the logits: where the model can, it makes those of one position alone. With a large
    vocabulary they are most of the work, of Gemma-3-270M 60 % of the FLOPs.
    """
    inputs: dict[str, Any] = dict(model_inputs(model, text.to(next(model.parameters()).device)))
    taken = inspect.signature(model.forward).parameters
    inputs |= {name: value for name, value in UNREAD.items() if name in taken}
    model(**inputs)


UNREAD: dict[str, Any] = {"logits_to_keep": 1, "use_cache": False}
"""Arguments of a forward pass of which neither logits nor a cache are read."""


def _decoder_inputs(model: Any, targets_BS: Tensor) -> dict[str, Tensor]:
    return {
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=targets_BS),
        "decoder_attention_mask": (targets_BS != IGNORE).long(),
    }
