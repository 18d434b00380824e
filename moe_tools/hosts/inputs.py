"""What a forward pass over plain text takes. Letters: B blocks, T tokens of a block."""

from __future__ import annotations

from torch import Tensor, nn


def model_inputs(model: nn.Module, block_BT: Tensor) -> dict[str, Tensor]:
    """A model's arguments for a batch of token blocks; an encoder-decoder gets it on both sides."""
    inputs = {"input_ids": block_BT}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = block_BT
    return inputs
