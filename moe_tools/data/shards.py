"""Rows on the disk: tokenised once, in shards, and read from there by every process.

CACHE/text/KEY/
    source.json         what it was made of, for people
    00000.ids           token ids of its rows, uint16 or uint32, little-endian, row by row
    00000.learned       one byte a token: whether it counts in the loss (not of running text)
    00000.sizes         tokens of each row, uint32 (where rows are uneven)
    00000.json          how many rows, the digest of the files, and where the source goes on
    end.json            the text has ended: there are no more shards

A shard is there once its .json is, which is written last: what a killed process left half is made
again, from where the shard before it stopped. So rows of a source without end are made as they are
asked for, and after a kill those that follow are the same as without one.

Rows are read with `pread` and not through a map: a page of a map counts as memory of the process
that touched it, for as long as the map is there; the system's page cache is the same for both.

Letters: T tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_tools.atomic import new_file
from moe_tools.data.cutter import Cutter
from moe_tools.data.progress import progress
from moe_tools.data.reader import Position, Reader
from moe_tools.data.rows import Row, Rows, named
from moe_tools.data.sources import is_hub
from moe_tools.disk import writing
from moe_tools.lock import Held, locked

logger = logging.getLogger(__name__)

SHARD = 2**22
"""Tokens of a shard: what has to be done again after a kill, and 80 MiB of memory on the way."""
OPEN = 64
"""Files that are kept open to read from."""
PAUSE = 0.2
"""Seconds between two looks at what another process makes."""
END = "end.json"


@dataclass(frozen=True)
class Shard:
    """What is known of one shard."""

    rows: int
    tokens: int
    largest: int
    bytes_each: int
    """Of a token id: 2 or 4."""
    sha256: str
    """Of its files one after another."""
    after: dict[str, Any]
    """Where the source goes on behind it, and what the cutter has left."""


class Stored(Rows):
    """The rows of one source, the first `wanted` of them; they are made when they are asked for."""

    def __init__(self, folder: Path, reader: Reader, wanted: int | None) -> None:
        """Opens what is there. `wanted` tokens, rounded up to a row; None: all, made at once.

        Raises:
            ValueError: the source cannot be read, or the disk refuses.
        """
        self.folder, self.reader, self.length = folder, reader, reader.length
        self.uniform = reader.cutter().uniform
        self.plain = self.uniform and reader.form == "text"
        self.shards: list[Shard] = []
        self.starts = [0]
        self.open: dict[str, int] = {}
        self.sizes: dict[int, NDArray[np.int64]] = {}
        self.ended, self.broken, self.proven = False, set[int](), set[int]()
        self.endless = is_hub(reader.source) and self.uniform and wanted is not None
        """Whether rows are made while they are asked for, since nobody waits for all of them."""
        self._look()
        if not self.endless:
            self._make_until(wanted)
        self.rows = self._rows_for(wanted)

    def __len__(self) -> int:
        return self.rows

    def row(self, index: int) -> Row:
        """One of them; it is made if need be.

        Raises:
            ValueError: the text ended before it, or the disk refuses.
        """
        self._make_row(index)
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        at = index - self.starts[shard]
        begin, size = (at * self.length, self.length) if self.uniform else self._place(shard, at)
        each = self.shards[shard].bytes_each
        kind = "<u2" if each == 2 else "<u4"
        ids = self._read(f"{shard:05d}.ids", begin * each, size * each)
        ids_T = np.frombuffer(ids, kind).astype(np.int64)
        if self.reader.form == "text":
            return Row(ids_T)
        return Row(ids_T, np.frombuffer(self._read(f"{shard:05d}.learned", begin, size), bool))

    def size(self, index: int) -> int:
        """Tokens of a row."""
        if self.uniform:
            return self.length
        self._make_row(index)
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self._place(shard, index - self.starts[shard])[1]

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokens; of a stream, which nobody has read yet, of its source and size."""
        if self.endless:
            return named(self.reader.key, self.rows)
        used = int(np.searchsorted(self.starts, self.rows, side="left"))
        return named(self.length, self.rows, *(shard.sha256 for shard in self.shards[:used]))

    @property
    def largest(self) -> int:
        """Of the shards that are there."""
        if not self.shards:
            self._make_row(0)
        return max(shard.largest for shard in self.shards)

    # --- reading

    def _read(self, name: str, offset: int, count: int) -> bytes:
        if name not in self.open:
            self._check_digest(int(name.partition(".")[0]))
            if len(self.open) == OPEN:
                os.close(self.open.pop(next(iter(self.open))))
            self.open[name] = os.open(self.folder / name, os.O_RDONLY)
        found = os.pread(self.open[name], count, offset)
        if len(found) != count:
            raise ValueError(
                f"{self.folder / name} ends too early: remove {self.folder}, it is made again"
            )
        return found

    def _check_digest(self, shard: int) -> None:
        """Reads a shard whole, once, before its first row: the disk may have lost some of it."""
        if shard in self.proven:
            return
        found = hashlib.sha256()
        for kind in self._kinds:
            found.update((self.folder / f"{shard:05d}.{kind}").read_bytes())
        if found.hexdigest() != self.shards[shard].sha256:
            raise ValueError(
                f"shard {shard} in {self.folder} is not what was written there: remove that folder "
                "and repeat the command, the text is tokenised again"
            )
        self.proven.add(shard)

    @property
    def _kinds(self) -> list[str]:
        """The files of a shard, in the order of its digest."""
        learned = [] if self.reader.form == "text" else ["learned"]
        return ["ids", *learned, *([] if self.uniform else ["sizes"])]

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for descriptor in self.__dict__.get("open", {}).values():
            close(descriptor)

    def _place(self, shard: int, at: int) -> tuple[int, int]:
        """First token of an uneven row in its shard, and how many it has."""
        if shard not in self.sizes:
            read = np.fromfile(self.folder / f"{shard:05d}.sizes", "<u4").astype(np.int64)
            if len(self.sizes) == OPEN:
                self.sizes.pop(next(iter(self.sizes)))
            self.sizes[shard] = np.r_[0, read.cumsum()]
        ends = self.sizes[shard]
        return int(ends[at]), int(ends[at + 1] - ends[at])

    def _rows_for(self, tokens: int | None) -> int:
        """Rows until so many tokens are reached; all, if there are fewer."""
        if tokens is None:
            return self.starts[-1]
        if self.uniform:
            wanted = -(-tokens // self.length)
            return wanted if self.endless else min(wanted, self.starts[-1])
        taken = 0
        for index in range(self.starts[-1]):
            if taken >= tokens:
                return index
            taken += self.size(index)
        return self.starts[-1]

    # --- making

    def _make_row(self, index: int) -> None:
        if index < self.starts[-1]:
            return
        self._make_until((index + 1) * self.length, rows=index + 1)
        if index >= self.starts[-1]:
            have = sum(shard.tokens for shard in self.shards)
            raise ValueError(
                f"{self.reader.source!r} ({self.reader.split}) ended after {have:,} tokens, and "
                f"{self.rows * self.length:,} were asked for: begin again with --tokens {have} or "
                "less, in another --output"
            )

    def _make_until(self, tokens: int | None, rows: int = 0) -> None:
        """Makes shards until there are so many tokens and rows; None: until the text ends."""

        def enough() -> bool:
            have = sum(shard.tokens for shard in self.shards)
            reached = tokens is not None and have >= tokens and self.starts[-1] >= rows
            return self.ended or reached

        self._look()
        while not enough():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with writing(self.folder), locked(self.folder / ".lock"):
                    self._look()
                    if not enough():
                        self._make(tokens, enough)
            except Held:
                time.sleep(PAUSE)  # another process makes it
            self._look()

    def _look(self) -> None:
        """Takes in the shards that are there by now."""
        while True:
            number = len(self.shards)
            try:
                shard = Shard(**json.loads((self.folder / f"{number:05d}.json").read_text()))
            except FileNotFoundError:
                break
            except (ValueError, TypeError):
                self._tell_broken(number)
                break
            if not self._is_whole(number, shard):
                self._tell_broken(number)
                break
            self.shards.append(shard)
            self.starts.append(self.starts[-1] + shard.rows)
        self.ended = self._end() == len(self.shards)

    def _tell_broken(self, number: int) -> None:
        if number not in self.broken:
            logger.warning("%s: shard %d is broken and is made again", self.folder, number)
        self.broken.add(number)

    def _end(self) -> int | None:
        try:
            return int(json.loads((self.folder / END).read_text())["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _is_whole(self, number: int, shard: Shard) -> bool:
        wanted = {"ids": shard.tokens * shard.bytes_each}
        if self.reader.form != "text":
            wanted["learned"] = shard.tokens
        if not self.uniform:
            wanted["sizes"] = 4 * shard.rows
        files = {self.folder / f"{number:05d}.{kind}": size for kind, size in wanted.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in files.items())

    def _make(self, tokens: int | None, enough: Callable[[], bool]) -> None:
        """Makes shards from where the last one stopped, until it is enough or the text ends."""
        self._forget_later()
        cutter = self.reader.cutter()
        position = None
        if self.shards:
            cutter.go_to(self.shards[-1].after["cutter"])
            position = self.shards[-1].after["position"]
        self._say_source()
        have = sum(shard.tokens for shard in self.shards)
        with progress(f"tokenising {self.reader.source}", tokens, "token") as bar:
            bar.update(have)
            for rows, after in _shards(self.reader, cutter, position):
                if after is not None:
                    self._write(rows, after)
                    bar.update(sum(len(row.ids_T) for row in rows))
                    self._look()
                else:
                    with new_file(self.folder / END) as partial:
                        partial.write_text(json.dumps({"shards": len(self.shards)}))
                    self.ended = True
                if enough():
                    break
        if self.ended:
            cutter.tell(f"{self.reader.source!r}")

    def _forget_later(self) -> None:
        """Removes what stands behind the shards that are whole: it is made again, in order."""
        (self.folder / END).unlink(missing_ok=True)
        for path in self.folder.glob("[0-9]*.*"):
            if int(path.name.partition(".")[0]) >= len(self.shards):
                path.unlink()

    def _say_source(self) -> None:
        with new_file(self.folder / "source.json") as partial:
            said = {"source": self.reader.source, "split": self.reader.split}
            partial.write_text(json.dumps({**said, "length": self.length}, indent=1))

    def _write(self, rows: list[Row], after: dict[str, Any]) -> None:
        number, found = len(self.shards), hashlib.sha256()
        largest = max(int(row.ids_T.max()) for row in rows)
        each = 2 if largest < 2**16 else 4
        ids_T = np.concatenate([row.ids_T for row in rows]).astype("<u2" if each == 2 else "<u4")
        parts = {"ids": ids_T.tobytes()}
        if self.reader.form != "text":
            learned = [row.learned_T for row in rows]
            parts["learned"] = np.concatenate(learned).tobytes()  # type: ignore[arg-type]
        if not self.uniform:
            parts["sizes"] = np.array([len(row.ids_T) for row in rows], dtype="<u4").tobytes()
        for kind, body in parts.items():
            with new_file(self.folder / f"{number:05d}.{kind}") as partial:
                partial.write_bytes(body)
            found.update(body)
        shard = Shard(len(rows), len(ids_T), largest, each, found.hexdigest(), after)
        with new_file(self.folder / f"{number:05d}.json") as partial:
            partial.write_text(json.dumps(asdict(shard)))


def _shards(
    reader: Reader, cutter: Cutter, position: Position | None
) -> Iterator[tuple[list[Row], dict[str, Any] | None]]:
    """Rows of about `SHARD` tokens, and where they end; None: there are no more."""
    rows: list[Row] = []
    tokens, after = 0, position
    for pieces, after in reader.read(position):
        for row in cutter.cut(pieces):
            rows.append(row)
            tokens += len(row.ids_T)
        if tokens >= SHARD:
            yield rows, {"position": after, "cutter": cutter.state()}
            rows, tokens = [], 0
    if rows:
        yield rows, {"position": after, "cutter": cutter.state()}
    yield [], None
