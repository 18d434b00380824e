"""Documents of hub data sets, streamed by the `datasets` library."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from moe_tools.data.cells import words
from moe_tools.data.holdout import TextSplit, is_held_out, normalise
from moe_tools.data.tables import (
    Form,
    Kind,
    Table,
    documents,
    form_of,
    kinds_of,
    one_line,
)
from moe_tools.extras import needed

HELDOUT_NAMES = ("validation", "test")
"""Splits of a hub data set that are held out already, best first."""
STRINGS = ("string", "large_string", "string_view")
"""What `datasets` calls a column of strings."""
REACH = "check its name and the network, or use a local file or 'docs'"
WINDOW = 1000
"""Rows that show what the columns hold, where a data set does not say so itself."""


class HubText:
    """The documents of a split of a hub data set, in its order: as they come, from any place on.

    Training text is the split "train". Held-out text is "validation", else "test", else those 5 %
    of the rows of "train" that a hash of their text selects (train then skips them).
    """

    def __init__(
        self,
        name: str,
        config: str | None,
        split: TextSplit,
        column: str | None = None,
    ) -> None:
        """Asks the hub for what is there, and for no row.

        Raises:
            ValueError: the data set cannot be reached or has no split "train".
        """
        label = f"hub data set {name!r}"
        datasets = needed("datasets", "data", label)
        with one_line(label, REACH):
            parts = datasets.load_dataset(name, config, streaming=True)
        if "train" not in parts:
            raise ValueError(f"{label} has no split 'train', only {', '.join(map(str, parts))}")
        own = next((part for part in HELDOUT_NAMES if part in parts), None)
        self.heldout = split == "heldout"
        self.divides = own is None
        """Whether the rows that are held out are among those of "train"."""
        self.column = column
        self.table = Stream(
            parts[own if own and self.heldout else "train"], label, f"hub:{name}:{config or ''}"
        )

    @property
    def form(self) -> Form:
        """What its documents are.

        Raises:
            ValueError: it cannot be reached, or it is in doubt which column they are in.
        """
        return form_of(self.table, self.table.kinds(), self.column)[0]

    def __iter__(self) -> Iterator[str]:
        rows = filter(str.strip, documents(self.table, self.column))
        if not self.divides:
            return rows
        said = str if self.form == "text" else words
        return (text for text in rows if is_held_out(normalise(said(text))) == self.heldout)

    def position(self) -> dict[str, Any]:
        """Where the stream is, as JSON takes it; for `go_to`."""
        state: dict[str, Any] = self.table.dataset.state_dict()
        return state

    def go_to(self, position: dict[str, Any]) -> None:
        """What is read from now on goes on behind a position."""
        self.table.dataset.load_state_dict(position)


class Stream(Table):
    """One split of a hub data set."""

    def __init__(self, dataset: Any, label: str, name: str) -> None:
        """Asks the hub for nothing yet."""
        self.dataset, self.label, self.name = dataset, label, name
        self.found: dict[str, Kind] | None = None

    def kinds(self) -> dict[str, Kind]:
        """By the features of the data set; without them, by its first `WINDOW` rows."""
        if self.found is None:
            with one_line(self.label, REACH):
                features = self.dataset.features
                if features is None:
                    self.found = kinds_of(itertools.islice(self.dataset, WINDOW))
                else:
                    self.found = {name: _kind(feature) for name, feature in features.items()}
        return self.found

    def rows(self, *columns: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Whole rows."""
        # The network is only touched by next(), so that every step can fail.
        with one_line(self.label, REACH):
            for number, row in enumerate(self.dataset, start=1):
                yield f"{self.label} row {number}", row


def _kind(feature: Any) -> Kind:
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if isinstance(inner, dict):  # a list of turns, whatever class this `datasets` has for lists
        return (
            "turns"
            if {"role", "content"} <= set(inner) or {"from", "value"} <= set(inner)
            else "other"
        )
    dtype = getattr(feature, "dtype", None)  # a nested feature is a dict or a list
    if dtype in STRINGS:
        return "strings"
    return "unknown" if dtype == "null" else "other"
