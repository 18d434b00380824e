"""What a forward pass over plain text takes. Letters: B blocks, T tokens of a block."""

from __future__ import annotations

from torch import Tensor, nn

from moe_tools.data.batch import Batch


def model_inputs(model: nn.Module, text: Tensor | Batch) -> dict[str, Tensor]:
    """A model's arguments for blocks_BT or a batch; an encoder-decoder gets it on both sides."""
    batch = Batch(text) if isinstance(text, Tensor) else text
    inputs = {"input_ids": batch.ids_BT}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = batch.ids_BT
    if batch.mask_BT is not None:
        inputs["attention_mask"] = batch.mask_BT.long()
    if batch.positions_BT is not None:
        inputs["position_ids"] = batch.positions_BT
    return inputs
