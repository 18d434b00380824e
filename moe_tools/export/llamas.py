"""What every export asks of a llama and its kin. Letters: B blocks, T tokens, V vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_tools.experts.conversion import Conversion


class Heads(NamedTuple):
    """Of an attention."""

    queries: int
    keys: int
    """Of keys and values, each shared by several of the queries."""
    width: int


def heads_of(config: Any) -> Heads:
    """The heads that a config means, where it leaves something out."""
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    return Heads(queries, keys, getattr(config, "head_dim", None) or config.hidden_size // queries)


def about_rope(config: Any) -> str | None:
    """What is unusual about the positions; None: nothing."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        return f"has rope scaling of type {rope['rope_type']}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"rotates only {rope['partial_rotary_factor']} of each head"
    return None


@torch.no_grad()
def logits_of(model: Any, ids_BT: Tensor) -> Tensor:
    """logits_BTV of a model of transformers."""
    logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits_BTV


def donor_file(conversion: Conversion | None) -> str | None:
    """The donor, where it is a GGUF file that is still there: it has the tokenizer."""
    donor = None if conversion is None else Path(conversion.donor)
    return str(donor) if donor is not None and donor.suffix == ".gguf" and donor.is_file() else None
