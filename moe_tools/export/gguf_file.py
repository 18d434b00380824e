"""A GGUF file: planned tensor by tensor, written with one of them in memory, read back.

Matrices are stored as f32, f16 or bf16, or in groups of 32 columns as q8_0 or q4_0, the embedding
and the head too; vectors and routers as f32. Without a tokenizer a file takes token ids, and
refuses text.

Letters: D width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_tools.atomic import new_file
from moe_tools.checkpoint.stored import some
from moe_tools.data.progress import progress
from moe_tools.export.plan import Kind
from moe_tools.extras import needed

FILE_TYPES: dict[Kind, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
"""What llama.cpp calls a file with most matrices of a kind (`general.file_type`)."""
WAY_OUT = "`moe-tools export --to dense` writes a folder that llama.cpp's own converter may read"
TOKENIZER = "tokenizer."
"""How the keys of a tokenizer begin."""
LARGEST = 65504.0
"""Of f16."""
GROUP = 32
"""Columns of one group of q8_0 and q4_0."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    """Of q and k: heads whose rows are put in llama.cpp's order; 0: rows stay as they are."""
    exact: bool = False
    """Stored as f32 under every kind."""


@dataclass(frozen=True)
class FilePlan:
    """What a file will hold."""

    tensors: dict[str, Planned]
    """By transformers' names, in the order of the file."""
    unwritten: frozenset[str]
    """What a state dict has besides: a head that is the embedding."""
    metadata: dict[str, int | float | bool]
    """Key, without the architecture before it -> value."""
    architecture: str = "llama"
    """As llama.cpp calls it."""
    common: dict[str, float] = field(default_factory=dict)
    """Key that is no architecture's -> value."""


def write_gguf(
    plan: FilePlan,
    tensors: Mapping[str, Tensor],
    file: Path,
    kind: Kind = "f16",
    tokenizer: str | None = None,
) -> None:
    """Writes a file, with one tensor in memory at a time besides those that are given.

    Args:
        plan: of the model.
        tensors: its state dict; a mapping that reads each tensor when it is asked for will do.
        file: where to; replaced when the new one is whole.
        kind: of the matrices. Rows that are no multiple of 32 are f16 where the kind has groups.
        tokenizer: a GGUF file whose tokenizer is copied; None: the file has none.

    Raises:
        ValueError: tensors that are not those of the plan, a number that f16 does not hold, a
            tokenizer of another vocabulary, no gguf package, or a disk that refuses the file.
    """
    gguf = needed("gguf", "gguf", f"writing {file.name}")
    _check_names(plan, tensors)
    with new_file(file) as partial:
        writer = gguf.GGUFWriter(partial, plan.architecture)
        try:
            _write_metadata(gguf, writer, plan, kind, tokenizer)
            kinds = {name: _kind_of(gguf, one, kind) for name, one in plan.tensors.items()}
            for name, one in plan.tensors.items():
                size = _size(gguf, one, kinds[name])
                writer.add_tensor_info(one.name, one.shape, "float16", size, kinds[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress("write", len(plan.tensors), "tensor") as bar:
                for name, one in plan.tensors.items():
                    writer.write_tensor_data(_stored(gguf, tensors[name], one, kinds[name]))
                    bar.update(1)
        finally:
            writer.close()


class ReadTensors(Mapping[str, Tensor]):
    """What a file says, and its tensors in fp32, by transformers' names, read when asked for.

    Raises:
        ValueError: the file has others than the plan.
    """

    def __init__(self, plan: FilePlan, file: Path) -> None:
        self._gguf = needed("gguf", "gguf", str(file))
        self._plan = plan
        reader = self._gguf.GGUFReader(file)
        self._stored = {one.name: one for one in reader.tensors}
        above = f"{reader.fields['general.architecture'].contents()}."
        self.metadata: dict[str, Any] = {
            key.removeprefix(above): field.contents()
            for key, field in reader.fields.items()
            if key.startswith(above)
        }
        """Key, without the architecture before it -> what the file says."""
        wanted = {one.name for one in plan.tensors.values()}
        if wanted != self._stored.keys():
            raise ValueError(f"{file} has other tensors: {some(wanted ^ self._stored.keys())}")

    def __getitem__(self, name: str) -> Tensor:
        planned = self._plan.tensors[name]
        stored = self._stored[planned.name]
        numbers = self._gguf.quants.dequantize(stored.data, stored.tensor_type)
        tensor = torch.from_numpy(numbers.astype("float32", copy=True)).reshape(planned.shape)
        if planned.heads:
            tensor = tensor.unflatten(0, (planned.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.tensors)

    def __len__(self) -> int:
        return len(self._plan.tensors)


def check_tokenizer(file: str, vocabulary: int) -> None:
    """Checks that a file has a tokenizer of so many tokens.

    Raises:
        ValueError: it is no GGUF file, or has no tokenizer, or another one.
    """
    gguf = needed("gguf", "gguf", "--tokenizer")
    if not Path(file).is_file():
        raise ValueError(f"--tokenizer {file} does not exist: give a GGUF file of the donor")
    try:
        fields = gguf.GGUFReader(file).fields
    except Exception as error:  # numpy and gguf raise of every kind
        raise ValueError(f"--tokenizer {file} is not a GGUF file, or damaged") from error
    tokens = fields.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise ValueError(f"--tokenizer {file} has no tokenizer: give a GGUF file of the donor")
    if len(tokens.data) != vocabulary:
        raise ValueError(
            f"--tokenizer {file} has {len(tokens.data)} tokens, but the model {vocabulary}: give "
            "a GGUF file of the donor"
        )


def _check_names(plan: FilePlan, tensors: Mapping[str, Tensor]) -> None:
    what = "a llama" if plan.architecture == "llama" else plan.architecture
    missing = plan.tensors.keys() - tensors.keys()
    if missing:
        raise ValueError(f"{what} has the tensors {some(missing)}, which are not there: {WAY_OUT}")
    others = tensors.keys() - plan.tensors.keys() - plan.unwritten
    if others:
        raise ValueError(f"{what} in GGUF has no place for the tensors {some(others)}: {WAY_OUT}")


def _write_metadata(
    gguf: Any, writer: Any, plan: FilePlan, kind: Kind, tokenizer: str | None
) -> None:
    writer.add_type("model")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(2)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in plan.metadata.items():
        add[type(value)](f"{plan.architecture}.{key}", value)
    for key, value in plan.common.items():
        writer.add_float32(key, value)
    if tokenizer is None:
        writer.add_tokenizer_model("none")  # as many tokens as `vocab_size` says, without text
        return
    for key, entry in gguf.GGUFReader(tokenizer).fields.items():
        if key.startswith(TOKENIZER):
            inner = entry.types[-1] if len(entry.types) > 1 else None
            writer.add_key_value(key, entry.contents(), entry.types[0], inner)


def _kind_of(gguf: Any, one: Planned, kind: Kind) -> Any:
    """The type of a tensor, one of `gguf.GGMLQuantizationType`."""
    types = gguf.GGMLQuantizationType
    if len(one.shape) == 1 or one.exact:
        return types.F32
    columns, _ = gguf.GGML_QUANT_SIZES[types[kind.upper()]]
    return types[kind.upper()] if one.shape[-1] % columns == 0 else types.F16


def _size(gguf: Any, one: Planned, kind: Any) -> int:
    """The bytes of a tensor."""
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    return int(torch.Size(one.shape).numel() // columns * size)


def _stored(gguf: Any, tensor: Tensor, one: Planned, kind: Any) -> Any:
    """The numbers of a tensor as the file has them, a numpy array."""
    if tuple(tensor.shape) != one.shape:
        raise ValueError(f"{one.name} is {tuple(tensor.shape)}, expected {one.shape}")
    types = gguf.GGMLQuantizationType
    numbers = tensor.detach().float()
    if one.heads:
        # (heads, 2 halves, numbers of a half, ...): the halves of a head become its neighbours
        parts = numbers.unflatten(0, (one.heads, 2, -1))
        numbers = parts.transpose(1, 2).flatten(0, 2)
    most = float(numbers.abs().max())
    if kind not in (types.F32, types.BF16) and not most <= LARGEST:  # NaN too
        raise ValueError(f"{one.name} has the number {most}, which f16 does not hold: {WAY_OUT}")
    return gguf.quants.quantize(numbers.contiguous().numpy(), kind)
