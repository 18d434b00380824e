"""Saves a model as a dense Hugging Face folder, with what moe-tools added beside it.

Safetensors and JSON only: no pickle.
"""

from __future__ import annotations

from pathlib import Path

import transformers

from moe_tools.atomic import new_folder
from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.card import write_card
from moe_tools.checkpoint.host_names import host_names
from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.experts.conversion import update_config
from moe_tools.hosts.ffn import host_state_dict


def save(
    model: transformers.PreTrainedModel,
    folder: str | Path,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes a model folder: complete or not at all, a converted one with its model card.

    Where moe-tools is imported, `save_pretrained` of a converted model writes the same files.

    Raises:
        ValueError: `folder` exists and is not empty, or an optimised model that has lost digits.
    """
    with new_folder(folder) as partial, quiet_transformers(), transformers_patched(True):
        update_config(model)
        state = host_state_dict(model)
        with host_names(model):
            model.save_pretrained(partial, state_dict=state, save_original_format=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_card(partial)
