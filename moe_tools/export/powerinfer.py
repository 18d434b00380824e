"""ReLU llamas with neuron predictors, as files for PowerInfer (arXiv 2312.12456).

PowerInfer is a llama.cpp of 2023. It runs a neuron where fc2 relu(fc1 r) is not below a threshold;
r is what the norm before the FFN got. Our predictor asks for sigmoid(W_2 relu(W_1 x)) > 1/2 of what
that norm gives, x = w * r / rms(r). Both layers are positively homogeneous: fc1 = W_1 diag(w) and
fc2 = W_2 choose the same neurons without the 1 / rms(r). With a bias there is no such way. Nothing
but a sign is asked of them, so that a power of two brings them to where f16 holds them best.

The file is a GGUF file by another first word (`MAGIC`), matrices in f16, vectors in f32.
`powerinfer_file` reads it back.

Letters: D width of the model, F neurons.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_tools.checkpoint.stored import some
from moe_tools.export.gguf import EMBEDDING, HEAD
from moe_tools.export.gguf import LAYER as DENSE
from moe_tools.export.gguf_file import LARGEST, FilePlan, Planned, check_tokenizer, write_gguf
from moe_tools.export.llamas import donor_file
from moe_tools.export.plan import Limits, Options, Plan, Written
from moe_tools.export.powerinfer_file import MAGIC, THRESHOLD, THRESHOLD_KEY, PowerInferFile
from moe_tools.export.powerinfer_limits import OTHERS, reason, told
from moe_tools.export.source import Source
from moe_tools.extras import needed

TOKENIZERS = ("llama", "gpt2")
"""SentencePiece, and byte-level BPE."""
TOKENIZER_WAY_OUT = (
    "give one by --tokenizer FILE.gguf, of the donor or from llama.cpp's "
    "`convert_hf_to_gguf.py DONOR --vocab-only`"
)
ASTRAY = 2e-4
"""Share of the neurons that may fall on the other side of 0: SmolLM2's FFNs have at most 5e-5, by
predictors that f16 rounds."""
EMBEDDED, HEADED = "model.embed_tokens.weight", "lm_head.weight"
NORM, DOWN = "post_attention_layernorm", "mlp.down_proj"
FIRST, SECOND = "mlp.router.first", "mlp.router.second"
LAYER = {**DENSE, DOWN: "ffn_down_t", FIRST: "fc1", SECOND: "fc2"}
"""Our names inside a layer -> PowerInfer's."""


@dataclass(frozen=True)
class PowerInferPlan(Plan):
    """The file of one model."""

    compared, is_file = True, True

    file: FilePlan
    neurons: int
    """Of an FFN."""
    rank: int
    """Units between the layers of a predictor."""
    tied: bool
    """The head is the embedding, of which PowerInfer wants a copy."""
    tokenizer: str

    @property
    def routed(self) -> bool:
        """Every neuron is an expert."""
        return True

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """That of the file."""
        return torch.float16

    @property
    def limits(self) -> Limits | None:
        """Of single decisions, as whole sets of thousands are seldom alike."""
        return Limits(2e-3, decisions=1 - ASTRAY)

    def facts(self) -> dict[str, Any]:
        """What will be in the file."""
        shapes = [planned.shape for planned in self.file.tensors.values()]
        return {
            "file": self.file.architecture,
            "type": "f16",
            "tokenizer": self.tokenizer,
            "neurons": self.neurons,
            "predictor_rank": self.rank,
            "bytes": sum(math.prod(shape) * (2 if len(shape) > 1 else 4) for shape in shapes),
        }

    def write(self, source: Source, place: Path) -> None:
        """Writes the file, one tensor in memory at a time, and its first word last.

        Raises:
            ValueError: tensors that are not those of the plan, or a number that f16 does not hold.
        """
        tensors = _Tensors(source.tensors(), self.file, self.tied)
        write_gguf(self.file, tensors, place, "f16", self.tokenizer)
        with place.open("r+b") as file:
            file.write(MAGIC)

    def read_back(self, place: Path, dtype: torch.dtype) -> Written | None:
        """What the file computes, by PowerInfer's formulas in PyTorch; in fp32 alone."""
        return PowerInferFile(place) if dtype == torch.float32 else None


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
    width, neurons = config.hidden_size, config.intermediate_size
    narrow = width // config.num_attention_heads * known.groups
    shapes = {
        "attn_q": (width, width),
        "attn_k": (narrow, width),
        "attn_v": (narrow, width),
        "attn_output": (width, width),
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "fc1": (known.rank, width),
        "fc2": (neurons, known.rank),
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": known.groups}
    matrix = (config.vocab_size, width)
    tensors = {EMBEDDED: Planned(EMBEDDING, matrix)}
    for layer in range(config.num_hidden_layers):
        for ours, name in LAYER.items():
            shape = shapes.get(name, (neurons, width))
            planned = Planned(f"blk.{layer}.{name}.weight", shape, heads.get(name, 0))
            tensors[f"model.layers.{layer}.{ours}.weight"] = planned
    tensors["model.norm.weight"] = Planned("output_norm.weight", (width,))
    tensors[HEADED] = Planned(HEAD, matrix)
    common = {THRESHOLD_KEY: THRESHOLD}
    file = FilePlan(tensors, frozenset(), _metadata(config, known.groups), known.arch, common)
    tied, tokenizer = bool(config.tie_word_embeddings), _tokenizer(source, options)
    return PowerInferPlan(file, neurons, known.rank, tied, tokenizer)


def _metadata(config: Any, groups: int) -> dict[str, int | float | bool]:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": groups,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def _tokenizer(source: Source, options: Options) -> str:
    """The GGUF file whose tokenizer is copied; without one, PowerInfer refuses a file."""
    file = options.tokenizer or donor_file(source.conversion)
    if file is None:
        raise ValueError(f"PowerInfer reads no file without a tokenizer: {TOKENIZER_WAY_OUT}")
    check_tokenizer(file, source.config.vocab_size)
    kind = needed("gguf", "gguf", file).GGUFReader(file).fields["tokenizer.ggml.model"].contents()
    if kind not in TOKENIZERS:
        raise ValueError(
            f"{file} has a tokenizer of the kind {kind}, and PowerInfer knows "
            f"{' and '.join(TOKENIZERS)}: {OTHERS}"
        )
    return file


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a file, made from those of a folder when they are asked for.

    Raises:
        ValueError: the folder has others than the plan.
    """

    def __init__(self, stored: Mapping[str, Tensor], file: FilePlan, tied: bool) -> None:
        self._stored, self._file, self._tied = stored, file, tied
        copied = {HEADED} if tied else set()
        missing = file.tensors.keys() - copied - stored.keys()
        if missing:
            raise ValueError(f"the folder lacks the tensors {some(missing)}: write it again")
        others = stored.keys() - file.tensors.keys()
        if others:
            raise ValueError(f"PowerInfer has no place for the tensors {some(others)}: {OTHERS}")

    def __getitem__(self, name: str) -> Tensor:
        shape = self._file.tensors[name].shape
        if DOWN in name:  # a row a neuron, as PowerInfer reads those that run
            return self._read(name, shape[::-1]).T
        if FIRST in name:
            norm_D = self._read(name.replace(FIRST, NORM), shape[1:])
            return _scaled(self._read(name, shape, math.inf) * norm_D)
        if SECOND in name:
            return _scaled(self._read(name, shape, math.inf))
        return self._read(EMBEDDED if self._tied and name == HEADED else name, shape)

    def _read(self, name: str, shape: tuple[int, ...], largest: float = LARGEST) -> Tensor:
        """A tensor in fp32, no number of which is above the largest that its place holds."""
        numbers = self._stored[name]
        if tuple(numbers.shape) != shape:
            raise ValueError(f"{name} is {tuple(numbers.shape)}, and the config says {shape}")
        numbers = numbers.float()
        most = float(numbers.abs().max())
        if not most <= largest or most == math.inf:  # NaN too
            raise ValueError(
                f"{name} has the number {most}, which f16 does not hold, and PowerInfer computes "
                f"in nothing else: {OTHERS}"
            )
        return numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def __len__(self) -> int:
        return len(self._file.tensors)


def _scaled(numbers: Tensor) -> Tensor:
    """A predictor's layer by a power of two, its largest number between 1/2 and 1."""
    most = float(numbers.abs().max())
    return numbers * 2.0 ** -math.frexp(most)[1]
