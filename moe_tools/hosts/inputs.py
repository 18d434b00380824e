"""What a forward pass over plain text takes. Letters: B blocks, T tokens of a block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def model_inputs(model: nn.Module, block_BT: Tensor) -> dict[str, Tensor]:
    """A model's arguments for a batch of token blocks; an encoder-decoder gets it on both sides."""
    inputs = {"input_ids": block_BT}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = block_BT
    return inputs


def text_config(model: nn.Module) -> Any:
    """The config of what writes text: a model of pictures and text keeps it inside its own."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def continues_text(model: Any) -> bool:
    """Whether a model predicts the next token of plain text: a causal language model.

    One that sees pictures beside the text is one too; an encoder-decoder is none.
    """
    return bool(model.can_generate()) and not model.config.is_encoder_decoder
