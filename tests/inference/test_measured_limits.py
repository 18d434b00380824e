"""Where dense is faster: measured once a machine, kept, and measured again where that is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_tools.bench.generate import threads
from moe_tools.inference import measured_limits
from moe_tools.inference.measured_limits import VARIABLE, measure, use_measured
from moe_tools.kernels.cpu import limits
from moe_tools.kernels.cpu.limits import BUILT_IN, Table, limits_for
from moe_tools.kernels.quantize import INT4

BF16 = torch.bfloat16
FOUND = Table(narrow=(0.9, 0.8, 0.7), wide=(0.6, 0.5, 0.4))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[torch.dtype]]:
    """The dtypes that were measured; what was in force comes back behind the test."""
    before, seen = dict(limits.in_force), []

    def counting(weights: torch.dtype) -> Table:
        seen.append(weights)
        return FOUND

    monkeypatch.setattr(measured_limits, "measure", counting)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE)
    yield seen
    limits.in_force.update(before)


def file_in(folder: Path) -> Path:
    return folder / "moe_tools" / "limits.json"


def test_a_machine_is_measured_once(measured: list[torch.dtype], tmp_path: Path) -> None:
    use_measured([BF16, torch.float32])
    assert measured == [BF16]
    assert [limits_for(BF16, BF16, t, 2048).most_many for t in (9, 17, 999)] == [0.6, 0.5, 0.4]
    assert limits_for(BF16, BF16, 64, 512).most_many == 0.8
    assert limits_for(torch.int8, BF16, 999, 2048).most_many == BUILT_IN[torch.int8].wide[2]
    limits.in_force.update(BUILT_IN)
    use_measured([BF16])
    assert measured == [BF16] and limits.in_force[BF16] == FOUND
    use_measured([INT4])
    assert measured == [BF16, INT4] and len(json.loads(file_in(tmp_path).read_text())) == 2


def test_other_numbers_of_threads_are_other_machines(measured: list[torch.dtype]) -> None:
    for count in (1, 2, 1):
        with threads(count):
            use_measured([BF16])
    assert measured == [BF16, BF16]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"a": 1}', '{"a": {"narrow": [1], "wide": [1, 1, 1]}}']
)
def test_a_file_that_cannot_be_read_is_measured_again(
    text: str, measured: list[torch.dtype], tmp_path: Path
) -> None:
    file_in(tmp_path).parent.mkdir()
    file_in(tmp_path).write_text(text)
    use_measured([BF16])
    use_measured([BF16])
    assert measured == [BF16] and limits.in_force[BF16] == FOUND


def test_where_nothing_can_be_written_it_holds_for_the_process(
    measured: list[torch.dtype], tmp_path: Path
) -> None:
    (tmp_path / "moe_tools").write_text("a file where the folder would be")
    use_measured([BF16])
    assert measured == [BF16] and limits.in_force[BF16] == FOUND


def test_built_in_tables_can_be_asked_for(
    measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "built-in")
    use_measured([BF16])
    assert measured == [] and dict(limits.in_force) == BUILT_IN


@pytest.mark.slow
@pytest.mark.parametrize("weights", list(BUILT_IN), ids=str)
def test_shares_are_measured(weights: torch.dtype) -> None:
    found = measure(weights)
    assert all(measured_limits.LEAST <= share <= 1 for share in (*found.narrow, *found.wide))
