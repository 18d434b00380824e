"""The texts on which papers measure perplexity, read and cut as their scripts do.

    protocol_text(name)                   the whole text, one string
    protocol_windows(name, tokenizer)     blocks_BT: its tokens, cut into windows of one length

Shapes: B windows, T tokens of one (`length`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_tools.data.files import SUFFIXES
from moe_tools.data.folders import text_files
from moe_tools.data.hub import Stream
from moe_tools.data.packing import check_size
from moe_tools.data.sources import mixture, parse_source
from moe_tools.data.tables import TABLES, Table, documents, form_of, one_line, open_table, utf8
from moe_tools.extras import needed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 2048
"""Tokens of a window, where nobody says another length and the model takes so many."""
FILES = (".raw", *SUFFIXES)
"""Files that a local copy may be: .raw is what the zip archives of WikiText hold."""
REACH = "check its name and the network, or name a copy of the text, a file or a folder"
CALLED = {"test": ("test",), "validation": ("validation", "valid", "val", "dev")}
"""Split -> words that a file or a folder of it is called by."""


@dataclass(frozen=True)
class Protocol:
    """One text, as the scripts of GPTQ, SparseGPT, Wanda and CMoE read it.

    https://github.com/IST-DASLab/sparsegpt/blob/master/datautils.py
    """

    hub: str
    """The data set."""
    split: str
    join: str
    """Stands between two rows."""
    config: str | None = None
    """Of the data set."""
    file: str | None = None
    """The one file of the data set that is read; None: all of the split."""
    revision: str | None = None
    """Of the data set; None: its newest."""
    rows: int | None = None
    """So many from the top; None: all."""
    windows: int | None = None
    """At most so many lengths of tokens are used; None: all."""
    line: Callable[[str], str] | None = None
    """A line of a text file, its end included -> a row, as the data set was made of that file;
    None: the file is one row."""

    @property
    def source(self) -> str:
        """What a report calls it."""
        return ":".join(filter(None, ("hub", self.hub, self.config or self.file)))


def _kept(line: str) -> str:
    """https://github.com/huggingface/datasets/blob/1.0.0/datasets/wikitext/wikitext.py."""
    return line if line.strip() else ""


PROTOCOLS = {
    "wikitext2": Protocol(
        "Salesforce/wikitext", "test", "\n\n", config="wikitext-2-raw-v1", line=_kept
    ),
    # its test split is that of WikiText-2
    "wikitext103": Protocol(
        "Salesforce/wikitext", "test", "\n\n", config="wikitext-103-raw-v1", line=_kept
    ),
    "c4": Protocol(
        "allenai/c4",
        "validation",
        " ",
        file="en/c4-validation.00000-of-00008.json.gz",
        rows=1100,
        windows=256,
    ),
    # the data set is a script, which `datasets` runs no more: this is what the hub made of it
    "ptb": Protocol(
        "ptb-text-only/ptb_text_only",
        "test",
        " ",
        file="penn_treebank/test/0000.parquet",
        revision="refs/convert/parquet",
        line=str.strip,
    ),
}


def protocol_windows(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = WINDOW,
    stride: int | None = None,
    source: str | None = None,
    tokens: int | None = None,
) -> Tensor:
    """The tokens of a paper's test text, in windows.

    The text is tokenised in one piece, with what the tokenizer itself puts before a text (BOS), so
    that this stands once, at the start of the first window. What does not fill a window at the end
    (with a stride: a step) is left out, as the scripts do.

    Args:
        name: of `PROTOCOLS`.
        tokenizer: the model's.
        length: tokens of a window.
        stride: tokens from the start of a window to that of the next; None: `length`, and no two
            windows overlap.
        source: stands in for the hub's data set, as in `protocol_text`.
        tokens: only the first windows, until they hold so many; None: all.

    Returns:
        blocks_BT, int64.

    Raises:
        ValueError: an unknown name, a size that is not possible, a source that cannot be read, or a
            text that is shorter than a window.
    """
    protocol = named_protocol(name)
    check_size("length", length)
    check_stride(length, stride)
    text = protocol_text(name, source)
    encoded = tokenizer(text, verbose=False)["input_ids"]
    ids_T = torch.tensor(encoded, dtype=torch.int64)
    if protocol.windows is not None:
        ids_T = ids_T[: protocol.windows * length]
    if len(ids_T) < length:
        raise ValueError(
            f"{source or protocol.source} has {len(ids_T)} tokens, one window of {name} needs "
            f"{length}: use a smaller --block-length, or the whole text"
        )
    step = stride or length
    windows_BT = ids_T.unfold(0, length, step)
    if tokens is not None:
        check_size("tokens", tokens)
        windows_BT = windows_BT[: 1 + max(0, -(-(tokens - length) // step))]
    return windows_BT.contiguous()


def protocol_text(name: str, source: str | None = None) -> str:
    """A paper's test text, in one piece.

    Args:
        name: of `PROTOCOLS`.
        source: None: the hub's data set. Else "hub:NAME[:CONFIG[:COLUMN]]", of which the same split
            is read; a .jsonl or .parquet file, "FILE:COLUMN", whose rows are those of the data set;
            a .txt, .md or .raw file, whose lines are (of c4, the file is one document); or a folder
            with one split in such files, or with files called after their split.

    Raises:
        ValueError: an unknown name, a source that cannot be read, or in doubt, or has no text.
    """
    protocol = named_protocol(name)
    rows = _hub_rows(protocol) if source is None else _rows(protocol, name, source)
    text = protocol.join.join(itertools.islice(rows, protocol.rows))
    if not text.strip():
        raise ValueError(f"{source or protocol.source} has no text: {name} needs some")
    return text


def named_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r} is unknown: use {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def check_stride(length: int, stride: int | None, after: int = 0) -> None:
    """Whether windows of a length may start so many tokens apart.

    Raises:
        ValueError: tokens would lie between two windows, or some would never be predicted.
    """
    if stride is None:
        return
    if not 1 <= stride <= length:
        raise ValueError(
            f"a stride of {stride} leaves tokens out between windows of {length}: --stride is a "
            f"number from 1 to {length}"
        )
    if after > length - stride:
        raise ValueError(
            f"windows of {length} at a stride of {stride} predict their last {stride} tokens, and "
            f"not those after the first {after}: --stride is at most {length - after}, or --after "
            f"at most {length - stride}"
        )


def _rows(protocol: Protocol, name: str, source: str) -> Iterator[str]:
    """The rows of what the user gives in place of the data set."""
    parts = mixture(source)
    found = parse_source(parts[0][0])
    if len(parts) > 1 or found.kind in ("docs", "self"):
        raise ValueError(
            f"{source!r} is no copy of {name}: use a file, a folder or hub:NAME, or name no "
            f"copy, to read {protocol.source}"
        )
    if found.kind == "hub":
        other = Protocol(found.name, protocol.split, protocol.join, config=found.config)
        return _hub_rows(other, found.column)
    path = Path(found.name)
    if not path.exists():
        raise ValueError(
            f"data source {source!r} is not there: {name} is read from a file "
            f"({', '.join(FILES)}), a folder of them or hub:NAME"
        )
    files = _files(protocol, name, path) if path.is_dir() else [path]
    return (row for file in files for row in _file_rows(protocol, file, found.column))


def _hub_rows(protocol: Protocol, column: str | None = None) -> Iterator[str]:
    """Streams the rows of one split, in its order; blank ones stay."""
    label = f"hub data set {protocol.hub!r}"
    datasets = needed("datasets", "data", label)
    options: dict[str, Any] = {}
    if protocol.file is not None:
        options["data_files"] = {protocol.split: protocol.file}
    if protocol.revision is not None:
        options["revision"] = protocol.revision
    with one_line(label, REACH):
        found = datasets.load_dataset(
            protocol.hub, protocol.config, split=protocol.split, streaming=True, **options
        )
    name = f"hub:{protocol.hub}:{protocol.config or ''}"
    return documents(Stream(found, label, name), column)


def _texts(table: Table, column: str | None) -> Iterator[str]:
    """The texts of a table; conversations are refused: a protocol is of running text."""
    kinds = table.kinds()
    if kinds and form_of(table, kinds, column)[0] != "text":
        raise ValueError(
            f"{table.label} holds conversations, and a protocol measures running text: name "
            "another file, or leave --protocol out"
        )
    return documents(table, column)


def _file_rows(protocol: Protocol, path: Path, column: str | None) -> Iterator[str]:
    """The rows of one file, by its kind; blank ones stay."""
    kind = path.suffix.lower()
    if kind not in FILES:
        raise ValueError(f"{str(path)!r} is no {', '.join(FILES)} file: convert it to one of them")
    if kind in TABLES:
        yield from _texts(open_table(path), column)
        return
    if column is not None:
        raise ValueError(f"{str(path)!r} has no columns, so none is {column!r}")
    # A file ends its lines as it did when the data set was made of it.
    with utf8(path), path.open(encoding="utf-8-sig") as lines:
        yield from [lines.read()] if protocol.line is None else map(protocol.line, lines)


def _files(protocol: Protocol, name: str, folder: Path) -> list[Path]:
    """The files of one split below a folder: never those of two, or of two data sets.

    Raises:
        ValueError: there is none, or it is in doubt which.
    """
    files = text_files(folder, FILES)
    if not files:
        raise ValueError(f"folder {str(folder)!r} has no file of text ({', '.join(FILES)})")
    words = CALLED[protocol.split]
    called = [file for file in files if _words(file.relative_to(folder)) & set(words)]
    chosen = called or files
    if not called and len(files) > 1:
        reason = f"has {len(files)} files, and none is called {' or '.join(words)}"
    elif len({file.parent for file in chosen}) > 1:
        reason = f"has {words[0]} files in several folders"
    else:
        return chosen
    raise ValueError(f"folder {str(folder)!r} {reason}: name the file or folder of {name}")


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", str(path).lower()))
