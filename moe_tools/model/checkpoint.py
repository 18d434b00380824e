"""A model folder in, a model out, and back: the names of `loading`, `saving` and `stored`."""

from moe_tools.model.loading import (
    is_classifier,
    is_classifier_source,
    load,
    load_classifier,
    load_tokenizer,
)
from moe_tools.model.quiet import quiet_transformers
from moe_tools.model.saving import save
from moe_tools.model.stored import INDEX, SINGLE, stored_tensors

__all__ = [
    "INDEX",
    "SINGLE",
    "is_classifier",
    "is_classifier_source",
    "load",
    "load_classifier",
    "load_tokenizer",
    "quiet_transformers",
    "save",
    "stored_tensors",
]
