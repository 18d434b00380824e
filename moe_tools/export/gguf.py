"""Dense llamas as GGUF files, for llama.cpp: a plan from the config, then tensor by tensor.

llama.cpp rotates neighbouring numbers of q and k where transformers rotates the halves of a head,
so that the rows of these two are written in another order. Matrices are stored as f16, or in
groups of 32 columns as q8_0 or q4_0, the embedding and the head too; vectors as f32. A file has no
tokenizer: llama.cpp takes token ids, and refuses text.

Letters: D width of the model, F neurons, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from moe_tools.checkpoint.atomic import new_file
from moe_tools.checkpoint.stored import some
from moe_tools.experts.conversion import read_block
from moe_tools.extras import needed

Kind = Literal["f16", "q8_0", "q4_0"]
FILE_TYPES: dict[Kind, int] = {"f16": 1, "q4_0": 2, "q8_0": 7}
"""What llama.cpp calls a file with most matrices of a kind (`general.file_type`)."""
HOSTS = ("llama", "mistral")
WAY_OUT = "`moe-tools export` writes a folder that llama.cpp's own converter may read"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
"""Where there is no head, the embedding is the head as well."""
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""transformers' names inside a layer -> llama.cpp's."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    """Of q and k: heads whose rows are put in llama.cpp's order; 0: rows stay as they are."""


@dataclass(frozen=True)
class Plan:
    """What a file will hold."""

    tensors: dict[str, Planned]
    """By transformers' names, in the order of the file."""
    unwritten: frozenset[str]
    """What a state dict has besides: a head that is the embedding."""
    metadata: dict[str, int | float]
    """Method of `gguf.GGUFWriter` -> the value that it writes."""


def plan(config: Any) -> Plan:
    """Plans the file of a dense model, by its config alone.

    Args:
        config: of the model; a routed one is planned as the dense model of the same weights.

    Raises:
        ValueError: a model that llama.cpp's `llama` would compute as another one, or not at all.
    """
    reason = _reason(config)
    if reason is not None:
        raise ValueError(f"GGUF is written of a plain llama, and {reason}: {WAY_OUT}")
    width, heads, groups = _widths(config)
    tensors = {"model.embed_tokens.weight": Planned(EMBEDDING, (config.vocab_size, width))}
    for number in range(config.num_hidden_layers):
        for theirs, name in LAYER.items():
            planned = Planned(f"blk.{number}.{name}.weight", *_inside(config, name))
            tensors[f"model.layers.{number}.{theirs}.weight"] = planned
    tensors["model.norm.weight"] = Planned("output_norm.weight", (width,))
    tied = bool(config.tie_word_embeddings)
    if not tied:
        tensors["lm_head.weight"] = Planned(HEAD, (config.vocab_size, width))
    metadata = {
        "add_vocab_size": config.vocab_size,
        "add_context_length": config.max_position_embeddings,
        "add_embedding_length": width,
        "add_block_count": config.num_hidden_layers,
        "add_feed_forward_length": config.intermediate_size,
        "add_head_count": heads,
        "add_head_count_kv": groups,
        "add_rope_dimension_count": width // heads,
        "add_rope_freq_base": float(config.rope_parameters["rope_theta"]),
        "add_layer_norm_rms_eps": float(config.rms_norm_eps),
    }
    return Plan(tensors, frozenset({"lm_head.weight"} if tied else ()), metadata)


def write_gguf(plan: Plan, tensors: Mapping[str, Tensor], file: Path, kind: Kind = "f16") -> None:
    """Writes a file, with one tensor in memory at a time besides those that are given.

    Args:
        plan: of the model.
        tensors: its state dict; a mapping that reads each tensor when it is asked for will do.
        file: where to; replaced when the new one is whole.
        kind: of the matrices. Rows that are no multiple of 32 are f16 under every kind.

    Raises:
        ValueError: tensors that are not those of the plan, a number that f16 does not hold, no
            gguf package, or a disk that refuses the file.
    """
    gguf = needed("gguf", "gguf", f"writing {file.name}")
    _check_names(plan, tensors)
    with new_file(file) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        try:
            _write_metadata(writer, plan, kind)
            kinds = {name: _kind_of(gguf, one, kind) for name, one in plan.tensors.items()}
            for name, one in plan.tensors.items():
                size = _size(gguf, one, kinds[name])
                writer.add_tensor_info(one.name, one.shape, "float16", size, kinds[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, one in plan.tensors.items():
                writer.write_tensor_data(_stored(gguf, tensors[name], one, kinds[name]))
        finally:
            writer.close()


def _reason(config: Any) -> str | None:
    """Returns why a model cannot be written; None when it can."""
    if config.model_type not in HOSTS:
        return f"this is a {config.model_type}"
    block = read_block(config)
    activation = config.hidden_act if block is None else block.activation or config.hidden_act
    if activation not in ("silu", "swish"):
        kind = activation["kind"] if isinstance(activation, dict) else activation
        return f"this one has the activation {kind}, where llama.cpp computes SiLU"
    for name in ("attention_bias", "mlp_bias", "sliding_window"):
        value = getattr(config, name, None)
        if value:
            return f"this one has {name} {value}"
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        return f"this one has rope scaling of type {rope['rope_type']}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"this one rotates only {rope['partial_rotary_factor']} of each head"
    width, heads, _ = _widths(config)
    head = getattr(config, "head_dim", None) or width // heads
    if heads * head != width:
        return f"this one has {heads} heads of {head}, which is not its width of {width}"
    return None


def _widths(config: Any) -> tuple[int, int, int]:
    """D, the heads of q, and those of k and v."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return config.hidden_size, heads, groups


def _inside(config: Any, name: str) -> tuple[tuple[int, ...], int]:
    """The shape of a tensor in a layer, and its heads if they are put in another order."""
    width, heads, groups = _widths(config)
    narrow, neurons = width // heads * groups, config.intermediate_size
    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "attn_q": ((width, width), heads),
        "attn_k": ((narrow, width), groups),
        "attn_v": ((narrow, width), 0),
        "attn_output": ((width, width), 0),
        "ffn_gate": ((neurons, width), 0),
        "ffn_up": ((neurons, width), 0),
        "ffn_down": ((width, neurons), 0),
    }
    return shapes.get(name, ((width,), 0))


def _check_names(plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    missing = plan.tensors.keys() - tensors.keys()
    if missing:
        raise ValueError(f"a llama has the tensors {some(missing)}, which are not there: {WAY_OUT}")
    others = tensors.keys() - plan.tensors.keys() - plan.unwritten
    if others:
        raise ValueError(f"a llama in GGUF has no place for the tensors {some(others)}: {WAY_OUT}")


def _write_metadata(writer: Any, plan: Plan, kind: Kind) -> None:
    writer.add_type("model")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(2)
    for method, value in plan.metadata.items():
        getattr(writer, method)(value)
    writer.add_tokenizer_model("none")  # as many tokens as `vocab_size` says, without text


def _kind_of(gguf: Any, one: Planned, kind: Kind) -> Any:
    """The type of a tensor, one of `gguf.GGMLQuantizationType`."""
    types = gguf.GGMLQuantizationType
    if len(one.shape) == 1:
        return types.F32
    columns, _ = gguf.GGML_QUANT_SIZES[types[kind.upper()]]
    return types[kind.upper()] if one.shape[-1] % columns == 0 else types.F16


def _size(gguf: Any, one: Planned, kind: Any) -> int:
    """The bytes of a tensor."""
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    numbers = 1
    for length in one.shape:
        numbers *= length
    return int(numbers // columns * size)


def _stored(gguf: Any, tensor: Tensor, one: Planned, kind: Any) -> Any:
    """The numbers of a tensor as the file has them, a numpy array."""
    if tuple(tensor.shape) != one.shape:
        raise ValueError(f"{one.name} is {tuple(tensor.shape)}, expected {one.shape}")
    numbers = tensor.detach().float()
    if one.heads:
        # (heads, 2 halves, numbers of a half, D): the halves of a head become its neighbours
        parts = numbers.unflatten(0, (one.heads, 2, -1))
        numbers = parts.transpose(1, 2).flatten(0, 2)
    most = float(numbers.abs().max())
    if kind != gguf.GGMLQuantizationType.F32 and not most <= 65504:  # the largest f16; NaN too
        raise ValueError(f"{one.name} has the number {most}, which f16 does not hold: {WAY_OUT}")
    return gguf.quants.quantize(numbers.contiguous().numpy(), kind)
