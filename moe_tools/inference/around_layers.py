"""What a host of a known form does around its layers, in the few steps that a new token needs.

transformers makes a mask, asks its config for every option and goes through several wrappers for
each layer: some tenths of a millisecond, of the five to ten that a token of a small model takes.

Letters: B sequences, D width, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

Layers = Callable[[Tensor, Mapping[str, Any]], tuple[Tensor, bool] | None]
"""From h_B1D and what a layer is given besides: h behind the layers, and whether it is normed, too.
None: the host has to compute it."""

_KNOWN = {
    "attention_mask",
    "input_ids",
    "inputs_embeds",
    "past_key_values",
    "position_ids",
    "use_cache",
}
NORM = "norm"
"""What every form calls the norm behind its layers."""
_AROUND = ("embed_tokens", "rotary_emb", NORM)


def new_token(
    model: nn.Module, given: Mapping[str, Any], layers: Layers
) -> BaseModelOutputWithPast | None:
    """Does what `model.forward` does for one new token a sequence.

    Args:
        model: whose `forward` embeds, turns positions into angles, runs layers that all see the
            same mask of every position, and ends with a norm.
        given: the arguments of that call, by name.
        layers: see there.

    Returns:
        None where the call asks for something else, or `layers` says None: the host's own code
        answers it. Nothing has been changed then.
    """
    if not given.keys() <= _KNOWN or not _is_usual(model) or _is_heard(model):
        return None
    ids_B1, cache = given.get("input_ids"), given.get("past_key_values")
    if not isinstance(ids_B1, Tensor) or ids_B1.ndim != 2 or ids_B1.shape[1] != 1:
        return None
    if type(cache) is not DynamicCache or not cache.layers:
        return None
    if given.get("inputs_embeds") is not None or not _keeps_the_cache(model, given):
        return None
    used, sequences = cache.get_seq_length(), len(ids_B1)
    known, mask_B11S = _mask(given.get("attention_mask"), (sequences, used + 1))
    positions_B1 = given.get("position_ids")
    if not known or not _are_positions(positions_B1, sequences):
        return None
    if positions_B1 is None:
        positions_B1 = torch.full((1, 1), used, device=ids_B1.device)
    host = cast("Any", model)
    h_B1D = host.embed_tokens(ids_B1)
    others = {
        "attention_mask": mask_B11S,
        "past_key_values": cache,
        "position_embeddings": host.rotary_emb(h_B1D, position_ids=positions_B1),
    }
    made = layers(h_B1D, others)
    if made is None:
        return None
    h_B1D, normed = made
    h_B1D = h_B1D if normed else host.norm(h_B1D)
    return BaseModelOutputWithPast(last_hidden_state=h_B1D, past_key_values=cache)


def _is_usual(model: nn.Module) -> bool:
    """Whether a config asks for nothing but the last h: read where it lies, as asking is slow."""
    config = vars(model.config)
    asked = ("_output_attentions", "output_hidden_states")
    return (
        not any(config.get(name) for name in asked)
        and config.get("return_dict", True) is not False
        and config.get("is_causal", True)
        and config.get("sliding_window") is None
    )


def _keeps_the_cache(model: nn.Module, given: Mapping[str, Any]) -> bool:
    asked = given.get("use_cache")
    return bool(vars(model.config).get("use_cache", True) if asked is None else asked)


def _is_heard(model: nn.Module) -> bool:
    """Whether somebody listens to what stands around the layers, and would hear it twice."""
    around = [cast("nn.Module", model._modules[name]) for name in _AROUND]
    return any(module._forward_hooks or module._forward_pre_hooks for module in around)


def _mask(mask: Any, shape: tuple[int, int]) -> tuple[bool, Tensor | None]:
    """Whether a mask is one that says which positions a text has, and what layers make of it."""
    if mask is None:
        return True, None
    if not isinstance(mask, Tensor) or mask.shape != shape:
        return False, None
    mask_BS = mask.bool()
    if mask_BS.all():
        return True, None
    return bool(mask_BS[:, -1].all()), mask_BS[:, None, None, :]


def _are_positions(positions: Any, sequences: int) -> bool:
    if positions is None:
        return True
    return isinstance(positions, Tensor) and positions.shape in ((1, 1), (sequences, 1))
