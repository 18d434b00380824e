"""Writes what was measured of a converted folder into its model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_tools.atomic import new_file
from moe_tools.checkpoint.card import check_card, write_card
from moe_tools.names import FIGURES
from moe_tools.report.report import Row, to_json


def write_figures(folder: Path, rows: Sequence[Row]) -> None:
    """Writes the rows into the folder, and into its card.

    The points of a sweep are left out: the card speaks of the model as it was saved.

    Raises:
        ValueError: no folder of a converted model, or a card that moe-tools did not write.
    """
    check_card(folder)
    with new_file(folder / FIGURES) as partial:
        partial.write_text(to_json([row for row in rows if not row.setting]))
    write_card(folder)
