"""The tokenizer of a GGUF file, copied into another one: GGUF has its own form of vocabularies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_tools.checkpoint.broken import named_errors
from moe_tools.export.plan import Options
from moe_tools.export.source import Source
from moe_tools.extras import needed

TOKENS = "tokenizer.ggml.tokens"
WAY_OUT = (
    "give one by --tokenizer FILE.gguf, of the donor or from llama.cpp's "
    "`convert_hf_to_gguf.py DONOR --vocab-only`"
)


@dataclass(frozen=True)
class Tokenizer:
    """All that a GGUF file says about its tokenizer."""

    file: str
    """Where it is from."""
    entries: dict[str, tuple[Any, Any, Any]]
    """Key -> value, `gguf.GGUFValueType`, and that of the entries of an array or None."""

    @property
    def model(self) -> str:
        """The kind of it, e.g. `gpt2` for byte-level BPE."""
        return str(self.entries["tokenizer.ggml.model"][0])

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.entries[TOKENS][0])

    @classmethod
    def read(cls, file: str) -> Tokenizer:
        """Reads that of a GGUF file.

        Raises:
            ValueError: no file, no GGUF, or one without a vocabulary.
        """
        gguf = needed("gguf", "gguf", f"reading {file}")
        with named_errors(f"cannot read the tokenizer of {file}: "):
            fields = gguf.GGUFReader(file).fields
            entries = {
                key: (field.contents(), field.types[0], field.types[-1] if field.data[1:] else None)
                for key, field in fields.items()
                if key.startswith("tokenizer.") and field.data
            }
        for key, kind in (("tokenizer.ggml.model", str), (TOKENS, list)):
            if key not in entries or not isinstance(entries[key][0], kind):
                raise ValueError(f"{file} has no tokenizer ({key} is missing): {WAY_OUT}")
        return cls(file, entries)

    @classmethod
    def of(cls, source: Source, options: Options) -> Tokenizer | None:
        """That of the file which a user names, or of a donor that is a GGUF file; else None.

        Raises:
            ValueError: as `read`.
        """
        if options.tokenizer is not None:
            return cls.read(options.tokenizer)
        donor = Path(source.conversion.donor if source.conversion is not None else source.name)
        return cls.read(str(donor)) if donor.suffix == ".gguf" and donor.is_file() else None

    def write(self, writer: Any) -> None:
        """Adds it to what a `gguf.GGUFWriter` writes."""
        for key, (value, kind, inner) in self.entries.items():
            writer.add_key_value(key, value, kind, sub_type=inner)
