"""Documents of hub data sets, streamed by the `datasets` library."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from moe_tools.data.holdout import TextSplit, is_held_out, normalise
from moe_tools.data.tables import Kind, Table, documents, kinds_of, one_line
from moe_tools.extras import needed

HELDOUT_NAMES = ("validation", "test")
"""Splits of a hub data set that are held out already, best first."""
STRINGS = ("string", "large_string", "string_view")
"""What `datasets` calls a column of strings."""
REACH = "check its name and the network, or use a local file or 'docs'"
WINDOW = 1000
"""Rows that show what the columns hold, where a data set does not say so itself."""


def hub_texts(
    name: str, config: str | None, split: TextSplit, column: str | None = None
) -> Iterator[str]:
    """Stream the documents of a hub data set, in its order.

    Training text is the split "train". Held-out text is "validation", else "test", else those 5 %
    of the rows of "train" that a hash of their text selects (train then skips them).

    Raises:
        ValueError: the data set cannot be reached or has no split "train" or no text column.
    """
    label = f"hub data set {name!r}"
    datasets = needed("datasets", "data", label)
    with one_line(label, REACH):
        parts = datasets.load_dataset(name, config, streaming=True)
    if "train" not in parts:
        raise ValueError(f"{label} has no split 'train', only {', '.join(map(str, parts))}")
    own = next((part for part in HELDOUT_NAMES if part in parts), None)
    wanted = split == "heldout"
    stream = Stream(parts[own if own and wanted else "train"], label, f"hub:{name}:{config or ''}")
    rows = filter(str.strip, documents(stream, column))
    return rows if own else (t for t in rows if is_held_out(normalise(t)) == wanted)


class Stream(Table):
    """One split of a hub data set."""

    def __init__(self, dataset: Any, label: str, name: str) -> None:
        """Asks the hub for nothing yet."""
        self.dataset, self.label, self.name = dataset, label, name

    def kinds(self) -> dict[str, Kind]:
        """By the features of the data set; without them, by its first `WINDOW` rows."""
        with one_line(self.label, REACH):
            features = self.dataset.features
            if features is None:
                return kinds_of(itertools.islice(self.dataset, WINDOW))
        return {name: _kind(feature) for name, feature in features.items()}

    def rows(self, *columns: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Whole rows."""
        # The network is only touched by next(), so that every step can fail.
        with one_line(self.label, REACH):
            for number, row in enumerate(self.dataset, start=1):
                yield f"{self.label} row {number}", row


def _kind(feature: Any) -> Kind:
    dtype = getattr(feature, "dtype", None)  # a nested feature is a dict or a list
    if dtype in STRINGS:
        return "strings"
    return "unknown" if dtype == "null" else "other"
