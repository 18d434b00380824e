"""ReLU llamas with neuron predictors, as files for PowerInfer (arXiv 2312.12456).

PowerInfer is a llama.cpp of 2023. It runs a neuron where fc2 relu(fc1 r) is not below a threshold;
r is what the norm before the FFN got. Our predictor asks for sigmoid(W_2 relu(W_1 x)) > 1/2 of what
that norm gives, x = w * r / rms(r). Both layers are positively homogeneous: fc1 = W_1 diag(w) and
fc2 = W_2 choose the same neurons without the 1 / rms(r). With a bias there is no such way. Nothing
but a sign is asked of them, so that a power of two brings them to where f16 holds them best.

The file is a GGUF file by another first word (`MAGIC`), matrices in f16, vectors in f32.
`powerinfer_file` reads it back.

Letters: D width of the model, F neurons, K units between a predictor's layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_tools.checkpoint.stored import some
from moe_tools.data.progress import progress
from moe_tools.export.gguf import EMBEDDING, HEAD
from moe_tools.export.gguf_tokenizer import WAY_OUT as TOKENIZER_WAY_OUT
from moe_tools.export.gguf_tokenizer import Tokenizer
from moe_tools.export.plan import Options, Plan
from moe_tools.export.powerinfer_file import MAGIC, THRESHOLD, PowerInferFile
from moe_tools.export.powerinfer_limits import OTHERS, reason, told
from moe_tools.export.source import Source
from moe_tools.extras import needed

TOKENIZERS = ("llama", "gpt2")
"""SentencePiece, and byte-level BPE."""
LARGEST = 65504.0
"""Of f16."""
FILE_TYPE = 1
"""What llama.cpp calls a file with most matrices in f16."""
LAYER = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate_proj.weight": "ffn_gate",
    "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_down_t",
    "mlp.router.first.weight": "fc1",
    "mlp.router.second.weight": "fc2",
}
"""Our names inside a layer -> PowerInfer's."""


@dataclass(frozen=True)
class Sizes:
    """What a file says about the model."""

    layers: int
    width: int
    neurons: int
    heads: int
    groups: int
    """Heads of k and v."""
    rank: int
    vocabulary: int

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of a layer as ours has it, by PowerInfer's name."""
        narrow = self.width // self.heads * self.groups
        shapes = {
            "attn_q": (self.width, self.width),
            "attn_k": (narrow, self.width),
            "attn_v": (narrow, self.width),
            "attn_output": (self.width, self.width),
            "ffn_gate": (self.neurons, self.width),
            "ffn_up": (self.neurons, self.width),
            "ffn_down_t": (self.width, self.neurons),
            "fc1": (self.rank, self.width),
            "fc2": (self.neurons, self.rank),
        }
        return shapes.get(name, (self.width,))


@dataclass(frozen=True)
class Entry:
    """A tensor of the file."""

    name: str
    ours: str
    """Its name in the folder."""
    shape: tuple[int, ...]
    """In the folder."""
    heads: int = 0
    """Of q and k: heads whose rows are put in llama.cpp's order."""
    norm: str | None = None
    """Of the first layer of a predictor: the norm that it takes up."""

    @property
    def transposed(self) -> bool:
        """A row a neuron, as PowerInfer reads those that run."""
        return "ffn_down_t" in self.name

    @property
    def written_shape(self) -> tuple[int, ...]:
        """In the file."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class PowerInferPlan(Plan):
    """The file of one model."""

    arch: str
    sizes: Sizes
    metadata: dict[str, int | float]
    """Method of `gguf.GGUFWriter` -> the value that it writes."""
    tied: bool
    tokenizer: Tokenizer

    @property
    def is_file(self) -> bool:
        """One file."""
        return True

    def facts(self) -> dict[str, Any]:
        """What will be in the file."""
        return {
            "architecture": self.arch,
            "layers": self.sizes.layers,
            "neurons": self.sizes.neurons,
            "predictor_rank": self.sizes.rank,
            "type": "f16",
            "tokenizer": self.tokenizer.file,
            "bytes": sum(_bytes(entry.shape) for entry in self.entries()),
        }

    def entries(self) -> list[Entry]:
        """The tensors, in the order of the file; the head of a tied model is its embedding."""
        sizes, embedding = self.sizes, "model.embed_tokens.weight"
        matrix = (sizes.vocabulary, sizes.width)
        found = [Entry(EMBEDDING, embedding, matrix)]
        for layer in range(sizes.layers):
            found += [_entry(sizes, f"model.layers.{layer}.", layer, ours) for ours in LAYER]
        found.append(Entry("output_norm.weight", "model.norm.weight", (sizes.width,)))
        found.append(Entry(HEAD, embedding if self.tied else "lm_head.weight", matrix))
        return found

    def write(self, source: Source, place: Path) -> None:
        """Writes the file, one tensor in memory at a time; its first word last.

        Raises:
            ValueError: tensors that are not those of the plan, a number that f16 does not hold, or
                no gguf package.
        """
        gguf = needed("gguf", "gguf", "writing a file for PowerInfer")
        tensors, entries = source.tensors(), self.entries()
        _check_names(tensors, {entry.ours for entry in entries}, self.tied)
        writer = gguf.GGUFWriter(place, self.arch)
        try:
            self._write_head(writer, gguf)
            with progress("export", len(entries), "tensor") as bar:
                for entry in entries:
                    writer.write_tensor_data(_stored(tensors, entry).numpy())
                    bar.update()
        finally:
            writer.close()
        with place.open("r+b") as file:
            file.write(MAGIC)

    def read_back(self, place: Path) -> PowerInferFile:
        """Reads the file, and computes as PowerInfer does."""
        return PowerInferFile(place)

    def _write_head(self, writer: Any, gguf: Any) -> None:
        writer.add_file_type(FILE_TYPE)
        for method, value in self.metadata.items():
            getattr(writer, method)(value)
        writer.add_float32("powerinfer.sparse_threshold", THRESHOLD)
        self.tokenizer.write(writer)
        types = gguf.GGMLQuantizationType
        for entry in self.entries():
            shape, kind = entry.written_shape, types.F16 if len(entry.shape) > 1 else types.F32
            writer.add_tensor_info(entry.name, shape, "float16", _bytes(shape), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


def plan_powerinfer(source: Source, options: Options) -> PowerInferPlan:
    """Plans the file of a folder, by its config and a tokenizer.

    Raises:
        ValueError: a model that PowerInfer would compute as another one, or not at all.
    """
    options.only("powerinfer", "tokenizer")
    why = reason(source)
    if why is not None:
        raise ValueError(f"{source.name} cannot be a file for PowerInfer: {why}")
    config, known = source.config, told(source)
    sizes = Sizes(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        neurons=config.intermediate_size,
        heads=config.num_attention_heads,
        groups=known.groups,
        rank=known.rank,
        vocabulary=config.vocab_size,
    )
    metadata = {
        "add_context_length": config.max_position_embeddings,
        "add_embedding_length": sizes.width,
        "add_block_count": sizes.layers,
        "add_feed_forward_length": sizes.neurons,
        "add_head_count": sizes.heads,
        "add_head_count_kv": sizes.groups,
        "add_rope_dimension_count": sizes.width // sizes.heads,
        "add_rope_freq_base": float(config.rope_parameters["rope_theta"]),
        "add_layer_norm_rms_eps": float(config.rms_norm_eps),
    }
    tied = bool(config.tie_word_embeddings)
    return PowerInferPlan(known.arch, sizes, metadata, tied, _tokenizer(source, options))


def _tokenizer(source: Source, options: Options) -> Tokenizer:
    """Without one, PowerInfer refuses the file."""
    found = Tokenizer.of(source, options)
    if found is None:
        raise ValueError(f"PowerInfer reads no file without a tokenizer: {TOKENIZER_WAY_OUT}")
    if found.model not in TOKENIZERS:
        raise ValueError(
            f"{found.file} has a tokenizer of the kind {found.model}, and PowerInfer knows "
            f"{' and '.join(TOKENIZERS)}: no other model than those has a file for it"
        )
    if found.size != source.config.vocab_size:
        raise ValueError(
            f"{found.file} has {found.size} tokens and the model {source.config.vocab_size}, but "
            f"PowerInfer takes the one for the other: {TOKENIZER_WAY_OUT}"
        )
    return found


def _entry(sizes: Sizes, prefix: str, layer: int, ours: str) -> Entry:
    """A tensor of a layer."""
    name = LAYER[ours]
    heads = {"attn_q": sizes.heads, "attn_k": sizes.groups}.get(name, 0)
    norm = f"{prefix}post_attention_layernorm.weight" if name == "fc1" else None
    return Entry(f"blk.{layer}.{name}.weight", prefix + ours, sizes.shape(name), heads, norm)


def _bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * (2 if len(shape) > 1 else 4)


def _check_names(tensors: Mapping[str, Tensor], needed: set[str], tied: bool) -> None:
    missing = needed - tensors.keys()
    if missing:
        raise ValueError(f"the folder lacks the tensors {some(missing)}: write it again")
    others = tensors.keys() - needed - ({"lm_head.weight"} if tied else set())
    if others:
        raise ValueError(f"PowerInfer has no place for the tensors {some(others)}: {OTHERS}")


def _stored(tensors: Mapping[str, Tensor], entry: Entry) -> Tensor:
    """The numbers of a tensor as the file has them."""
    numbers = _read(tensors, entry.ours, entry.shape)
    if entry.norm is not None:
        numbers = numbers * _read(tensors, entry.norm, entry.shape[1:])
    if entry.heads:
        # (heads, 2 halves, numbers of a half, D): the halves of a head become its neighbours
        parts = numbers.unflatten(0, (entry.heads, 2, -1))
        numbers = parts.transpose(1, 2).flatten(0, 2)
    if ".fc" in entry.name:
        numbers = _scaled(numbers)
    if entry.transposed:
        numbers = numbers.T
    most = float(numbers.abs().max())
    if not most <= (LARGEST if numbers.ndim > 1 else math.inf):  # NaN too
        raise ValueError(
            f"{entry.ours} has the number {most}, which f16 does not hold, and PowerInfer computes "
            f"in nothing else: {OTHERS}"
        )
    return numbers.contiguous().to(torch.float16 if numbers.ndim > 1 else torch.float32)


def _read(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    numbers = tensors[name]
    if tuple(numbers.shape) != shape:
        raise ValueError(f"{name} is {tuple(numbers.shape)}, and the config says {shape}")
    return numbers.float()


def _scaled(numbers: Tensor) -> Tensor:
    """A predictor's layer by a power of two, its largest number between 1/2 and 1."""
    most = float(numbers.abs().max())
    return numbers * 2.0 ** -math.frexp(most)[1] if 0 < most < math.inf else numbers
