"""A folder that any program reads, loaded by its stock class in transformers.

Letters: B blocks, T tokens, D model width, R experts that are routed, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.loading import host_class, read_config
from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.checkpoint.stored import some
from moe_tools.export.llamas import logits_of
from moe_tools.export.plan import FFNOutput, Written


class StockModel(Written):
    """The stock class, filled with every tensor of the folder and no other.

    Raises:
        ValueError: the folder and the class differ in a tensor.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        with quiet_transformers(), transformers_patched(True):
            host: Any = host_class(read_config(str(folder)))
            model, report = host.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        for words, keys in (
            ("lacks", report["missing_keys"]),
            ("has no place for", report["unexpected_keys"]),
        ):
            if keys:
                raise ValueError(f"{type(model).__name__} {words} the tensors {some(keys)}")
        self.model = model.eval()

    @torch.no_grad()
    def ffn(self, layer: int, x_TD: Tensor, residual_TD: Tensor) -> FFNOutput:
        """The MoE block of a layer, and what its router chose."""
        block = self.model.model.layers[layer].mlp
        *_, chosen_TK = block.gate(x_TD[None])
        mask_TR = torch.zeros(len(x_TD), len(block.gate.weight), dtype=torch.bool)
        return FFNOutput(block(x_TD[None])[0], mask_TR.scatter(1, chosen_TK, True))

    def logits(self, ids_BT: Tensor) -> Tensor:
        """logits_BTV."""
        return logits_of(self.model, ids_BT)
