"""Pieces -> rows, in order and one after another. Letters: T tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_tools.data.pieces import Piece
from moe_tools.data.rows import Packing, Row
from moe_tools.data.tables import Form

logger = logging.getLogger(__name__)


@dataclass
class Cutter:
    """Cuts pieces into rows, and keeps what is left for the next ones.

    Joined, pieces stand end to end in rows of `length` tokens. Otherwise a row is a piece, or of
    running text a part of one; a longer conversation loses its end, which is counted.
    """

    length: int
    begin: list[int]
    """Tokens in front of every row that the form does not begin itself."""
    form: Form
    packing: Packing
    left_T: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Tokens that fill no row yet."""
    learned_T: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    shortened: int = 0
    """Conversations that lost their end."""
    unlearned: int = 0
    """Rows of which no token would be learned, and which are left out."""

    @property
    def uniform(self) -> bool:
        """Whether every row has the full length."""
        return self.packing == "joined"

    def cut(self, pieces: list[Piece]) -> Iterator[Row]:
        """The rows that are full now, or all of them where a row is a piece."""
        rows = self._joined(pieces) if self.uniform else self._whole(pieces)
        for row in rows:
            if row.learned_T is None or row.learned_T[1:].any():
                yield row
            else:
                self.unlearned += 1

    def _joined(self, pieces: list[Piece]) -> Iterator[Row]:
        masked = self.form != "text"
        self.left_T = np.concatenate([self.left_T, *(piece.ids_T for piece in pieces)])
        if masked:
            learned = [piece.learned_T for piece in pieces]
            self.learned_T = np.concatenate([self.learned_T, *learned])  #
        fresh = self.length - len(self.begin)
        whole = len(self.left_T) // fresh * fresh
        for start in range(0, whole, fresh):
            part = slice(start, start + fresh)
            yield self._row(self.left_T[part], self.learned_T[part] if masked else None)
        self.left_T, self.learned_T = self.left_T[whole:], self.learned_T[whole:]

    def _whole(self, pieces: list[Piece]) -> Iterator[Row]:
        for ids_T, learned_T in pieces:
            if self.form == "text":
                fresh = self.length - len(self.begin)
                for start in range(0, len(ids_T), fresh):
                    if len(self.begin) + len(ids_T) - start > 1:  # a token that nothing precedes
                        yield self._row(ids_T[start : start + fresh], None)
                continue
            self.shortened += len(ids_T) > self.length
            assert learned_T is not None
            yield Row(ids_T[: self.length], learned_T[: self.length])

    def _row(self, ids_T: NDArray[np.int64], learned_T: NDArray[np.bool_] | None) -> Row:
        begun_T = np.concatenate([np.array(self.begin, dtype=np.int64), ids_T])
        if learned_T is not None:
            learned_T = np.concatenate([np.zeros(len(self.begin), bool), learned_T])
        return Row(begun_T, learned_T)

    def state(self) -> dict[str, Any]:
        """What is left over, as JSON takes it."""
        return {
            "left": self.left_T.tolist(),
            "learned": np.flatnonzero(self.learned_T).tolist(),
            "shortened": self.shortened,
            "unlearned": self.unlearned,
        }

    def go_to(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` said."""
        self.left_T = np.array(state["left"], dtype=np.int64)
        self.learned_T = np.zeros(len(self.left_T) if self.form != "text" else 0, bool)
        self.learned_T[state["learned"]] = True
        self.shortened, self.unlearned = state["shortened"], state["unlearned"]

    def tell(self, where: str) -> None:
        """Logs what was shortened or left out."""
        if self.shortened:
            logger.warning(
                "%s: %d conversations are longer than %d tokens and lose their end",
                *(where, self.shortened, self.length),
            )
        if self.unlearned:
            logger.warning(
                "%s: %d rows have no token of an assistant and are left out", where, self.unlearned
            )
