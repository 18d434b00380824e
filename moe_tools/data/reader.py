"""A source -> pieces, from any position on: what packing in memory and on the disk both read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_tools.data.cutter import Cutter
from moe_tools.data.holdout import TextSplit
from moe_tools.data.hub import HubText
from moe_tools.data.parallel import encoded
from moe_tools.data.passages import batches, in_order
from moe_tools.data.pieces import Encoder, Piece, begin_tokens, encoder
from moe_tools.data.rows import Bos, Packing
from moe_tools.data.sources import form, is_hub, parse_source, texts
from moe_tools.data.tables import Form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 32
"""Passages a call of the tokenizer: enough for its threads, little to throw away."""
HUB_WINDOW = 1000
"""Rows of a hub data set that are put in order together: a stream is never there as a whole."""

Position = dict[str, Any]
"""A place between two pieces, as JSON takes it."""


@dataclass(frozen=True)
class Reader:
    """One source for one tokenizer."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    split: TextSplit
    length: int
    seed: int = 0
    packing: Packing = "joined"
    bos: Bos = "auto"
    place: Path | None = None
    """Folder for what does not fit in memory while it is put in order."""
    workers: int = 1
    """Processes that encode."""

    @cached_property
    def form(self) -> Form:
        """What its documents are.

        Raises:
            ValueError: the source cannot be read.
        """
        return self.stream.form if is_hub(self.source) else form(self.source)

    @cached_property
    def stream(self) -> HubText:
        """The hub's data set, of which nothing is read here but what its columns hold.

        Raises:
            ValueError: it cannot be reached.
        """
        found = parse_source(self.source)
        return HubText(found.name, found.config, self.split, found.column)

    @cached_property
    def encoder(self) -> Encoder:
        """What makes pieces of them.

        Raises:
            ValueError: the tokenizer cannot.
        """
        alone = self.packing != "joined"
        return encoder(self.form, self.tokenizer, self.begin if alone else [])

    @cached_property
    def begin(self) -> list[int]:
        """What every row of text begins with.

        Raises:
            ValueError: BOS is asked for and there is none, or it leaves no room in a row.
        """
        begin = _begin(self.tokenizer, self.bos)
        if self.length <= len(begin):
            raise ValueError(
                f"blocks of {self.length} tokens have no room for text: this tokenizer begins a "
                f"text with {len(begin)} tokens, use a larger --block-length"
            )
        return begin

    def cutter(self) -> Cutter:
        """What makes rows of the pieces."""
        return Cutter(self.length, self.begin, self.form, self.packing)

    def read(self, position: Position | None = None) -> Iterator[tuple[list[Piece], Position]]:
        """Pieces, some at a time, from a position on; and the position behind them.

        Raises:
            ValueError: the source cannot be read.
        """
        if is_hub(self.source):
            return self._windows(position or {"window": None, "used": 0})
        return self._all((position or {"pieces": 0})["pieces"])

    def _all(self, start: int) -> Iterator[tuple[list[Piece], Position]]:
        documents = texts(self.source, split=self.split)
        whole = self.form != "text"
        ordered = in_order(
            documents, self.split, self.seed, start=start, whole=whole, place=self.place
        )
        for pieces, count in encoded(self.encoder, batches(ordered, BATCH), self.workers):
            start += count
            yield pieces, {"pieces": start}

    def _windows(self, position: Position) -> Iterator[tuple[list[Piece], Position]]:
        """Of a stream: rows are put in order window by window."""
        stream = self.stream  # one for all of a run: the revision that it began on
        window, used = position["window"], position["used"]
        if window is not None:
            stream.go_to(window)
        for documents in batches(stream, HUB_WINDOW):
            after = stream.position()
            ordered = in_order(
                documents, self.split, self.seed, start=used, whole=self.form != "text"
            )
            for pieces, count in encoded(self.encoder, batches(ordered, BATCH), self.workers):
                used += count
                yield pieces, {"window": window, "used": used}
            window, used = after, 0

    @cached_property
    def key(self) -> str:
        """Names the rows that it makes: equal where source, tokenizer and packing are."""
        said = {
            "source": identity(self.source),
            "split": self.split,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "length": self.length,
            "seed": self.seed if self.split == "train" else 0,
            "packing": self.packing,
            "begin": self.begin,
            "version": 1,
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def _begin(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> list[int]:
    if bos == "never":
        return []
    begin = begin_tokens(tokenizer)
    if bos == "auto":
        return begin
    first = tokenizer.bos_token_id
    if not isinstance(first, int):
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no BOS token, and bos is 'always': use "
            "'auto' or 'never'"
        )
    return begin if first in begin else [first, *begin]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that stand for a tokenizer: its vocabulary, its rules, its chat template."""
    found = hashlib.sha256()
    if tokenizer.is_fast:
        found.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        found.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id]
    found.update(repr([*special, tokenizer.pad_token_id, tokenizer.chat_template]).encode())
    return found.hexdigest()[:16]


def identity(source: str) -> list[Any]:
    """What changes when a source does: of files their sizes and times, of the hub its revision."""
    found = parse_source(source)
    said: list[Any] = [found.kind, found.config, *found.columns]
    if found.kind == "docs":
        from moe_tools.data.docs import TEXT

        return [*said, TEXT]
    if found.kind == "hub":
        return [*said, found.name, revision(found.name, found.config)]
    from moe_tools.data.files import files_of

    stats = [(str(path.resolve()), path.stat()) for path in files_of(Path(found.name))]
    return [*said, *((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)]


def revision(name: str, config: str | None) -> str:
    """What `datasets` calls the version of a hub data set that it would read now; "" if unknown."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config)
    except Exception:  # no network: what is read next says so
        return ""
    return str(getattr(builder, "hash", "") or "")
