"""Sources and targets: their columns, their batches, and that padding is masked on both sides."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tools.data import Batch, fingerprint, token_count
from moe_tools.data.seq2seq import seq2seq_batches, unpadded
from moe_tools.names import IGNORE
from tests.tiny import build_tokenizer, write_rows

TOKENIZER = build_tokenizer()
EOS, W0 = 1, 3


def rows(source: str = "source", target: str = "target", count: int = 100) -> list[dict[str, str]]:
    draw = random.Random(0)
    found = []
    for i in range(count):
        words = [f"w{i % 60}", *draw.choices([f"w{w}" for w in range(60)], k=draw.randint(0, 9))]
        found.append({source: " ".join(words), target: " ".join(words[: 1 + i % 4])})
    return found


def batches(source: str, **options: Any) -> list[Batch]:
    defaults = {"split": "train", "length": 16, "batch_size": 4}
    return seq2seq_batches(source, TOKENIZER, **(defaults | options))


def pairs(found: list[Batch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every row without padding."""
    plain = []
    for batch in found:
        assert batch.targets_BS is not None
        mask_BT = torch.ones_like(batch.ids_BT) if batch.mask_BT is None else batch.mask_BT
        for ids_T, mask_T, targets_S in zip(batch.ids_BT, mask_BT, batch.targets_BS, strict=True):
            said = targets_S[targets_S != IGNORE]
            plain.append((tuple(ids_T[mask_T.bool()].tolist()), tuple(said.tolist())))
    return plain


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("source", "target"),
        ("input", "target"),
        ("inputs", "targets"),
        ("input", "output"),
        ("document", "summary"),
        ("article", "highlights"),
        ("prompt", "completion"),
    ],
)
def test_usual_names_are_known(source: str, target: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "known.jsonl", rows(source, target))
    named = write_rows(tmp_path / "named.jsonl", rows("von", "nach"))
    assert fingerprint(batches(file)) == fingerprint(batches(f"{named}:von:nach"))


def test_every_row_is_there_once_and_its_target_ends(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows())
    found = [*batches(file), *batches(file, split="heldout")]
    expected = []
    for row in rows():
        source, target = (
            tuple(int(word[1:]) + W0 for word in row[side].split()) for side in ("source", "target")
        )
        expected.append((source, (*target, EOS)))
    assert sorted(pairs(found)) == sorted(expected)
    assert token_count(found) == sum(len(own) + len(said) for own, said in expected)
    assert 5 < sum(len(b.ids_BT) for b in batches(file, split="heldout")) < 40


def test_little_is_padding(tmp_path: Path) -> None:
    found = batches(write_rows(tmp_path / "rows.jsonl", rows(count=2000)))
    cells = sum(b.ids_BT.numel() + b.next_labels_BT().numel() for b in found)
    assert token_count(found) / cells > 0.9
    assert any(batch.mask_BT is not None for batch in found)


def test_a_target_keeps_its_end_when_it_is_cut(tmp_path: Path) -> None:
    found = [{"source": f"w{i}", "target": "w1 w2 w3 w4 w5"} for i in range(40)]
    file = write_rows(tmp_path / "long.jsonl", found)
    assert {said for _, said in pairs(batches(file, length=3))} == {(4, 5, EOS)}


def test_unpadded_rows_are_the_same_rows(tmp_path: Path) -> None:
    found = batches(write_rows(tmp_path / "rows.jsonl", rows()))
    plain = list(unpadded(found))
    assert sorted(pairs(plain)) == sorted(pairs(found))
    for batch in plain:
        assert batch.mask_BT is None and (batch.next_labels_BT() != IGNORE).all()


def test_more_tokens_are_more_epochs_and_a_seed_is_an_order(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows())
    once = batches(file)
    twice = batches(file, tokens=2 * token_count(once))
    assert sorted(pairs(twice)) == sorted(pairs(once) * 2)
    assert fingerprint(twice[: len(once)]) == fingerprint(once) == fingerprint(batches(file))
    assert fingerprint(batches(file, seed=1)) != fingerprint(once)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"source": "a", "target": None}, "", "line 1 has text in 'source' and none in 'target'"),
        ({"source": "", "target": "b"}, "", "line 1 has text in 'target' and none in 'source'"),
        ({"source": "a", "target": 3}, ":source:target", 'line 1 has no string "target"'),
        ({"source": "a", "label": "b"}, "", "has no two columns of strings that are a source and"),
        ({"source": "a", "target": "b"}, ":source", "'source' names 1 columns, but a source and a"),
        ({"source": "a", "target": "b"}, ":source:goal", "has no column 'goal'"),
        ({"source": "a", "target": "b"}, ":a:b:c", "more than two columns: FILE:SOURCE:TARGET"),
    ],
)
def test_rows_that_are_none(
    row: dict[str, Any], columns: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        batches(write_rows(tmp_path / "bad.jsonl", [row]) + columns)
    assert "\n" not in str(error.value)


def test_what_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'docs' is no \.jsonl or \.parquet file: give one"):
        batches("docs")
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    file = write_rows(tmp_path / "rows.jsonl", rows())
    with pytest.raises(ValueError, match="has no EOS token, with which a target ends"):
        seq2seq_batches(file, tokenizer, split="train", length=8, batch_size=2)
