"""What this transformers calls the recomputing of layers in the backward pass: 5 renamed it."""

from __future__ import annotations

from transformers import PreTrainedModel

NAME = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"  # 5.17 and earlier
)
"""The training argument; its options end in `_kwargs`, methods of models in `_disable` and such."""
