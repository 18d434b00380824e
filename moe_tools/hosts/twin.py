"""A shrunk twin of any Hugging Face model: the same family and the same code, tiny sizes.

`shrink` knows how configurations name their sizes, and few families. What changes how an FFN
computes (activations, limits, multipliers, biases, gates, dropouts) is no size, and stays.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

WIDTH = 32
"""D of a twin."""
NEURONS = 48
"""F of a twin's dense FFNs."""
VOCABULARY = 96
HEADS = 2
MOST_LAYERS = 8
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


@dataclass(frozen=True)
class _Sizes:
    """What the sizes of one configuration were, and become."""

    width: int
    neurons: int
    old_width: int | None
    old_heads: int | None

    @property
    def head(self) -> int:
        return self.width // HEADS

    @property
    def expert(self) -> int:
        """Neurons of an expert: not as many as a dense FFN has, so that nothing mistakes them."""
        return self.neurons - 8


_Rule = int | Callable[[int, _Sizes], int]
"""The most that a size may be, or how to compute it."""


def _width(value: int, sizes: _Sizes) -> int:
    """The model's width stays the model's width, any other one becomes half of it."""
    return sizes.width if value == sizes.old_width else sizes.width // 2


def _kv_heads(value: int, sizes: _Sizes) -> int:
    """One for each head, or one for all: these are two code paths."""
    return HEADS if value == sizes.old_heads else 1


def _head(_: int, sizes: _Sizes) -> int:
    return sizes.head


_NAMES: tuple[tuple[str, _Rule], ...] = (
    (r"(moe|expert|shared).*(intermediate|ffn|hidden).*(size|dim)", lambda _, s: s.expert),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size)", lambda _, s: s.neurons),
    (r"d_ff|dff|dim_ff|mlp_dim|d_inner|n_inner|feed_forward_size", lambda _, s: s.neurons),
    (r".*(kv|key_value)_heads|kv_n_heads|num_query_groups", _kv_heads),
    (r"(mamba_n(um)?|n_mamba|linear_num_value)_heads", 4),
    (r"linear_num_key_heads", HEADS),
    (r".*(n|num|attention|n_group)_?heads?(_per_layer)?", HEADS),
    (r"qk_nope_head_dim", 16),
    (r"qk_head_dim", lambda _, s: 16 + s.head),
    (r"rotary_dim", 8),
    (r".*(head_?dim|head_size|dim_head|d_head|d_kv|kv_channels)|mamba_headdim", _head),
    (r"mamba_d_ssm", lambda _, s: 2 * s.width),
    (r"(mamba_d|.*state).*(state|size)|.*dt_rank|time_step_rank", 8),
    (r".*(rank)|mamba_d_state|hc_lowrank", 8),
    (r"type_vocab_size", 2),
    (r".*vocab_(size.*|base)|.*_vocab", VOCABULARY),
    (r".*(num|n)_(shared|null)_experts|n_shared.*", 1),
    (r".*(topk|top_k|per_tok(en)?|moe_k)", 2),
    (r".*(n|num)_.*experts|zero_expert_num", 4),
    (r"(.*n_group|.*expert_group|topk_group|n_groups|.*ngroups|hc_.*|.*_groups)", 2),
    (r".*(layers?|num_blocks|depth)_?(per_stack)?", 2),
    (r".*(layer_period|sparse_step|every_n_layers|layer_interval|group_size)", 2),
    (r".*layer_offset", 1),
    (r".*(sliding_window|window_size|attention_window.*|window_len|attn_chunk_length)", 8),
    (r"(mamba_|attention_)?chunk_size", 8),
    (r".*(max|n)_.*(positions?|embeddings)|.*seq_len|n_ctx|context_length|.*pos_emb", 128),
    (r".*kernel_size", 3),
    (r"cross_attn_k|num_codebooks", 1),
    (r"attention_hidden_size", lambda value, s: s.width * (1 if value == s.old_width else 2)),
    (r"hidden_size_global|adapter_out_dim|out_hidden_size", lambda _, s: s.width),
    (r"block_multiple_of", 4),
    (r"codebook_size", 32),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r".*(hidden_size.*|d_model|n_embd|dim|width|_size|out_channel|conv_channels)", _width),
)
"""How configurations name their sizes; the first pattern that fits the whole name counts."""

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
_LAYER_NUMBERS = r".*(layers|layer_ids|_idxs|_indices)"
_FIRST_LAYERS = r"first_k_dense_replace|num_dense_layers|moe_layer_start_index"
_LAST_LAYERS = r"num_kv_shared_layers"
_TOKEN = r".*token_(id|ids|index)|(eos|bos|unk|mask|pad)_index|.*suppress_tokens"

_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
# Two blocks that share their weights, and others between them.
_ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
_DORY = {
    "num_hidden_layers": 4,
    "n_input_layers": 1,
    "n_recurrent_layers": 2,
    "n_output_layers": 1,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_INDEXER = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": lambda sizes: sizes.head,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_DECODERS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) - set(
    MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
)
_FAMILIES: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"head_dim": lambda sizes: 16 + sizes.head},
    "dory": _DORY,
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 95, "pad_token_id": 1},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4},
    "perceiver": {"num_latents": 8, "d_latents": 16, "num_self_attends_per_block": 2},
    "qwen4_exp_text": _INDEXER,
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA | {"attention_head_dim": lambda sizes: sizes.width},
    "zamba2": _ZAMBA
    | {"hybrid_layer_ids": [1, 3], "attention_head_dim": lambda sizes: sizes.width},
}
"""Model type -> values that no pattern gives."""


def shrink(
    config: PreTrainedConfig, *, width: int = WIDTH, neurons: int = NEURONS
) -> PreTrainedConfig:
    """Gives the configuration of a model of the same family with tiny sizes.

    There are two layers, or as many as it takes to have one of every kind.

    Args:
        config: of any size; stays as it is.
        width: D.
        neurons: F of a dense FFN. An expert has 8 fewer.

    Raises:
        ValueError: the family refuses its tiny sizes.
    """
    try:
        return type(config).from_dict(_shrunk(config, width, neurons))
    except Exception as error:  # a family's own checks raise anything
        raise _refused(type(config).__name__, error) from error


def build_twin(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, *, seed: int = 0
) -> PreTrainedModel:
    """Builds a random model: in eval mode, fp32, attention and experts in plain PyTorch, no cache.

    Every parameter that is saved gets noise of 0.1 s.d.: no bias is 0, no norm weight 1.

    Args:
        model_class: one of transformers, for language modelling or without a head.
        config: a tiny one, see `shrink`; stays as it is.
        seed: of all random numbers; the global generator is left as it was.

    Raises:
        ValueError: the family cannot be built from this configuration.
    """
    config = copy.deepcopy(_config_of(model_class, config))
    if model_class.__name__ in _DECODERS and "is_decoder" in vars(config):
        config.is_decoder = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = model_class._from_config(config, dtype=torch.float32, **PLAIN)
        except Exception as error:
            raise _refused(model_class.__name__, error) from error
        _add_noise(model)
    model.config.use_cache = False
    return model.eval()


@torch.no_grad()
def _add_noise(model: PreTrainedModel) -> None:
    computed = set(model._keys_to_ignore_on_save or ())  # sinusoids: a loaded model has no noise
    for name, parameter in model.named_parameters():
        if name not in computed:
            parameter.add_(0.1 * torch.randn_like(parameter))


def _config_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a composite configuration that the class takes: the language model's."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = (part for part in vars(config).values() if isinstance(part, wanted))
    return next(parts, config)


def _refused(name: str, error: Exception) -> ValueError:
    said = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{name} cannot be built with tiny sizes: {said}")


def _shrunk(config: PreTrainedConfig, width: int, neurons: int) -> dict[str, Any]:
    values = config.to_dict()
    sizes = _Sizes(width, neurons, _first(values, _WIDTHS), _first(values, _HEADS))
    layers = _Layers.of(values)
    for key, value in values.items():
        inner = vars(config).get(key)
        if isinstance(inner, PreTrainedConfig):
            values[key] = _shrunk(inner, width, neurons)
        elif (of_layers := layers.shrink(key, value)) is not None:
            values[key] = of_layers if isinstance(value, int) else _resize(key, of_layers, sizes)
        elif key == "rope_parameters":
            values[key] = _rope(value, sizes.head)
        else:
            values[key] = _resize(key, value, sizes)
    values |= {"use_cache": False, "dtype": "float32"}
    filled = {"head_dim": sizes.head, "num_key_value_heads": HEADS, "n_inner": neurons}
    values |= {key: small for key, small in filled.items() if values.get(key, 0) is None}
    values.pop("quantization_config", None)
    own = _FAMILIES.get(config.model_type, {})
    own = {key: value(sizes) if callable(value) else value for key, value in own.items()}
    return _merged(values, own)


def _merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`values` with those of `more` put in, also one level down."""
    return values | {
        key: values[key] | value if isinstance(values.get(key), dict) else value
        for key, value in more.items()
    }


def _first(values: dict[str, Any], names: Sequence[str]) -> int | None:
    return next((values[name] for name in names if isinstance(values.get(name), int)), None)


def _resize(key: str, value: Any, sizes: _Sizes) -> Any:
    """A value by its name; one that is no size comes back."""
    if key == "per_layer_config":
        return {layer: _resize_all(settings, sizes) for layer, settings in value.items()}
    if isinstance(value, list | tuple):
        return [_resize(key, each, sizes) for each in value]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if re.fullmatch(_TOKEN, key):
        return value if value < VOCABULARY else _special(key)
    for pattern, rule in _NAMES:
        if re.fullmatch(pattern, key):
            return min(value, rule) if isinstance(rule, int) else rule(value, sizes)
    return value


def _resize_all(settings: dict[str, Any], sizes: _Sizes) -> dict[str, Any]:
    """The settings of one layer, which may have heads of its own."""
    sizes = replace(sizes, old_heads=_first(settings, _HEADS) or sizes.old_heads)
    return {key: _resize(key, value, sizes) for key, value in settings.items()}


def _special(key: str) -> int:
    """A token that no test draws, the same for the same name."""
    usual = {"pad": 0, "bos": 1, "eos": 2}
    return usual.get(key[:3], VOCABULARY - 1 - sum(key.encode()) % 24)


def _rope(value: Any, head: int) -> Any:
    """Lists with an entry for each pair of rotated features get shorter, also one level down."""
    if not isinstance(value, dict):
        return value
    pairs = int(head * value.get("partial_rotary_factor", 1.0)) // 2
    small = {key: _rope(inner, head) for key, inner in value.items()}
    for key in ("long_factor", "short_factor"):
        if key in small:
            small[key] = small[key][:pairs]
    if "mrope_section" in small:
        third = pairs // 3
        small["mrope_section"] = [pairs - 2 * third, third, third]
    return small


@dataclass(frozen=True)
class _Layers:
    """Which layers of a configuration its twin has: the first ones of every kind."""

    count: int
    kept: list[int]

    @classmethod
    def of(cls, values: dict[str, Any]) -> _Layers:
        """The kinds are told apart by every list of layers, and by every number of first ones."""
        count = _first(values, _LAYERS) or 0
        columns = [column for key in values for column in cls._column(key, values[key], count)]
        kinds = [str(row) for row in zip(*columns, strict=True)] or [""] * count
        kept = {kinds.index(kind) for kind in kinds}
        more = (layer for layer in range(count) if layer not in kept)
        kept |= {next(more, 0) for _ in range(2 - len(kept))}
        return cls(count, sorted(kept)[:MOST_LAYERS])

    @staticmethod
    def _column(key: str, value: Any, count: int) -> list[list[Any]]:
        """What a value says of each layer, if it does."""
        if _is_layer_numbers(key, value):
            return [[layer in value for layer in range(count)]]
        if isinstance(value, list | tuple) and len(value) == count > 0:
            return [list(value)]
        if re.fullmatch(_FIRST_LAYERS, key) and isinstance(value, int):
            return [[layer < value for layer in range(count)]]
        if re.fullmatch(_LAST_LAYERS, key) and isinstance(value, int):
            return [[layer >= count - value for layer in range(count)]]
        return []

    def shrink(self, key: str, value: Any) -> Any:
        """A value that counts or lists layers, for those that are kept; None: another value."""
        if _is_layer_numbers(key, value):
            return [self.kept.index(layer) for layer in value if layer in self.kept]
        if isinstance(value, list | tuple) and len(value) == self.count > 0:
            return [value[layer] for layer in self.kept]
        if key == "per_layer_config" and isinstance(value, dict):
            old = {int(layer): settings for layer, settings in value.items()}
            return {str(new): old[at] for new, at in enumerate(self.kept) if at in old}
        if not isinstance(value, int):
            return None
        if key in _LAYERS and value == self.count:
            return len(self.kept)
        if re.fullmatch(_FIRST_LAYERS, key):
            return sum(layer < value for layer in self.kept)
        if re.fullmatch(_LAST_LAYERS, key):
            return sum(layer >= self.count - value for layer in self.kept)
        return None


def _is_layer_numbers(key: str, value: Any) -> bool:
    """Whether a value lists some layers by their number, rather than one flag a layer."""
    if not isinstance(value, list | tuple) or not re.fullmatch(_LAYER_NUMBERS, key):
        return False
    return all(isinstance(each, int) for each in value) and len(set(value)) == len(value)
