"""Tile sizes: a pinned default for each number of tokens, and the candidates of `tune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace


@dataclass(frozen=True)
class Config:
    """Sizes of the tiles, powers of two. None of them changes which rows are read."""

    tile: int
    """Neurons of one program of launch one, when it reads the mask alone."""
    gate_tile: int
    """Neurons of one program of launch one, when it reads gate rows too; a multiple of `rows`."""
    rows: int
    """Neurons of one program of launch two; 16 or more where tokens share a program."""
    columns: int
    """Columns of one step of launches one and two."""
    down_rows: int
    """Neurons of one step of launch three."""
    down_columns: int
    """Columns of one program of launch three."""
    splits: int
    """Shares of the list in launch three; the sums are added in their order."""
    warps: int
    """How many warps one program has."""

    def __post_init__(self) -> None:
        wrong = [size for size in astuple(self) if size < 1 or size & (size - 1)]
        if wrong:
            raise ValueError(f"tile sizes {wrong} of {self}: sizes are powers of two")
        if self.rows > min(self.tile, self.gate_tile):
            raise ValueError(f"{self}: rows divide tile and gate_tile")

    @property
    def numbers(self) -> list[int]:
        """The sizes as an operator's schema can say them."""
        return list(astuple(self))

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Config | None:
        """Undoes `numbers`; None for an empty sequence."""
        names = [field.name for field in fields(cls)]
        return cls(**dict(zip(names, numbers, strict=True))) if numbers else None

    def fitted(self, tokens: int, width: int) -> Config:
        """Takes no more columns than the width has, and no less than matrix units ask for (16)."""
        least = 2 if tokens == 1 else 16  # two codes of four bits share a byte
        together = 1 if tokens == 1 else 16
        columns = max(least, next_power(width))
        return replace(
            self,
            tile=max(self.tile, together),
            gate_tile=max(self.gate_tile, together),
            rows=max(self.rows, together),
            columns=max(least, min(self.columns, columns)),
            down_rows=max(self.down_rows, together),
            down_columns=max(least, min(self.down_columns, columns)),
        )


def next_power(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


MOST_TOGETHER = 64
"""How many tokens the largest tile holds."""


def tokens_of_a_program(tokens: int) -> int:
    """Puts one token alone; from two on, tiles of 16 to 64 share the rows that any one needs."""
    return 1 if tokens == 1 else min(MOST_TOGETHER, max(16, next_power(tokens)))


ONE_TOKEN = Config(
    tile=128,
    gate_tile=16,
    rows=8,
    columns=512,
    down_rows=64,
    down_columns=128,
    splits=8,
    warps=4,
)
FEW_TOKENS = Config(
    tile=128,
    gate_tile=16,
    rows=16,
    columns=128,
    down_rows=32,
    down_columns=128,
    splits=4,
    warps=4,
)
MANY_TOKENS = replace(FEW_TOKENS, gate_tile=32, rows=32, columns=64)
"""64 tokens: half the columns, for sm_90 keeps both operands in shared memory; twice the rows, for
fewer than 8 elements a thread make narrow loads."""
CODES = replace(FEW_TOKENS, gate_tile=32, rows=32)
"""Weights in eight and four bits and more than one token: a thread still loads 16 bytes."""
MANY_CODES = replace(CODES, gate_tile=64, rows=64, columns=64)
"""64 tokens: with 128 columns the numbers that codes become would not fit into registers."""
GROUPED = replace(FEW_TOKENS, gate_tile=64, rows=64, columns=32)
"""64 pairs of one expert; `tile`, `gate_tile` and `splits` play no part."""


def pinned(tokens: int, codes: bool = False) -> Config:
    """The default, chosen by registers, spills and load widths: no GPU has timed it yet.

    `codes` says that the weights are stored in eight or four bits.
    """
    if tokens == 1:
        return ONE_TOKEN
    if codes:
        return CODES if tokens <= 32 else MANY_CODES
    return FEW_TOKENS if tokens <= 32 else MANY_TOKENS


def candidates(tokens: int) -> list[Config]:
    """Lists the pinned default first, then what `tune` tries beside it."""
    if tokens == 1:
        tried = [
            replace(
                ONE_TOKEN,
                gate_tile=gate_tile,
                rows=rows,
                columns=columns,
                down_rows=down_rows,
                splits=splits,
                warps=warps,
            )
            for gate_tile, rows, columns in ((16, 8, 512), (8, 4, 1024), (16, 16, 256))
            for down_rows, splits in ((64, 8), (32, 16))
            for warps in (4, 8)
        ]
    else:
        tried = [
            replace(
                FEW_TOKENS,
                gate_tile=rows,
                rows=rows,
                columns=columns,
                down_columns=down_columns,
                splits=splits,
            )
            for rows, columns in ((16, 128), (32, 64))
            for down_columns in (64, 128)
            for splits in (4, 8)
        ]
    return [pinned(tokens), *(config for config in tried if config != pinned(tokens))]
