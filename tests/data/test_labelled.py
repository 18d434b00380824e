"""Labelled batches: rows of one length, every example once an epoch, none of them held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moe_tools.data import Batch, fingerprint, label_names, labelled_batches, token_count
from tests.cli.test_verbs import WORDS, build_tokenizer

TOKENIZER = build_tokenizer(WORDS)


@pytest.fixture(scope="module")
def mails(tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 texts of 1 to 9 words; w0 stands in those labelled yes."""
    file = tmp_path_factory.mktemp("data") / "mails.jsonl"
    rows = []
    for index in range(200):
        words = [f"w{1 + (index * 7 + place) % 59}" for place in range(1 + index % 9)]
        label = "yes" if index % 3 == 0 else "no"
        rows.append({"text": " ".join([f"w{index % 60}", *words]), "label": label})
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def batches(mails: str, **options: object) -> list[Batch]:
    defaults = {"split": "train", "length": 8, "batch_size": 4, "seed": 0}
    return labelled_batches(mails, TOKENIZER, **(defaults | options))  # type: ignore[arg-type]


def rows(found: list[Batch]) -> Counter[tuple[tuple[int, ...], int]]:
    return Counter(
        (tuple(ids.tolist()), int(label))
        for batch in found
        for ids, label in zip(batch.ids_BT, batch.labels_B, strict=True)
    )


def test_an_epoch_has_every_example_of_its_split_once(mails: str) -> None:
    train, held = rows(batches(mails)), rows(batches(mails, split="heldout"))
    assert sum(train.values()) + sum(held.values()) == 200
    assert not set(train) & set(held) or 0.1 < sum(held.values()) / 200 < 0.3
    assert 0.1 < sum(held.values()) / 200 < 0.3


def test_rows_of_a_batch_are_of_one_length_and_none_is_padded(mails: str) -> None:
    found = batches(mails)
    assert all(1 <= len(batch.ids_BT) <= 4 and batch.ids_BT.shape[1] <= 8 for batch in found)
    assert {batch.ids_BT.shape[1] for batch in found} == set(range(2, 9))
    assert all(len(batch.labels_B) == len(batch.ids_BT) for batch in found)


def test_a_text_is_on_one_side_whatever_its_layout(tmp_path: Path) -> None:
    texts = [f"w{i} w{i + 1}" for i in range(50)]
    lines = [{"text": t, "label": i % 2} for i, t in enumerate(texts)]
    lines += [{"text": f"  {t.upper()} ", "label": i % 2} for i, t in enumerate(texts)]
    file = tmp_path / "twice.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    held = sum(rows(batches(str(file), split="heldout")).values())
    assert held % 2 == 0 and held > 0


def test_labels_are_numbers_in_the_order_of_their_names(mails: str) -> None:
    assert label_names(mails) == ["no", "yes"]
    share = sum(int(batch.labels_B.sum()) for batch in batches(mails)) / 160
    assert 0.2 < share < 0.5


def test_more_tokens_are_more_epochs_in_another_order(mails: str) -> None:
    once = batches(mails)
    tokens = token_count(once)
    twice = batches(mails, tokens=2 * tokens)
    assert rows(twice) == rows(once) + rows(once)
    assert fingerprint(twice[: len(once)]) == fingerprint(once)
    assert fingerprint(twice[len(once) :]) != fingerprint(once)
    some = batches(mails, tokens=100)
    assert 100 <= token_count(some) < 100 + 4 * 8
    assert fingerprint(some) == fingerprint(once[: len(some)])


def test_a_seed_decides_the_order_of_training_alone(mails: str) -> None:
    assert fingerprint(batches(mails)) == fingerprint(batches(mails))
    assert fingerprint(batches(mails, seed=1)) != fingerprint(batches(mails))
    held = [batches(mails, split="heldout", seed=seed) for seed in (0, 1)]
    assert fingerprint(held[0]) == fingerprint(held[1])


def test_a_label_changes_the_fingerprint() -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    one, other = ([Batch(ids, torch.tensor([label]))] for label in (0, 1))
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}', r"has no column 'label' \(columns: text\): name one that it has"),
        ('{"text": 3, "label": 1}', 'line 1 has no string "text"'),
        ('{"text": "a", "label": 0.5}', "line 1 has the label 0.5: every text needs one that is a"),
        ('{"text": "a", "label": null}', "line 1 has the label None: every text needs"),
        ('{"text": "a", "label": "x"}\n{"text": "a"}', "line 2 has the label None"),
        ('{"text": "a", "label": "x"}\n{"text"', "line 2 is not JSON"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}', "fewer than two labels"),
        ('{"text": "\\ud800", "label": 1}', "line 1 has half of a surrogate pair"),
        ('{"a": "a", "b": "b", "label": 1}', r"2 other columns .* e\.g\. '.*bad\.jsonl:b'"),
        ("", r"has no column 'label' \(columns: none\)"),
    ],
)
def test_a_file_that_cannot_be_learned_from(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        batches(str(file))
    assert "\n" not in str(error.value)


def test_rows_without_text_are_left_out(mails: str, tmp_path: Path) -> None:
    file = tmp_path / "holes.jsonl"
    file.write_text(
        '{"text": null, "label": 1}\n{"text": " ", "label": null}\n' + Path(mails).read_text()
    )
    assert rows(batches(str(file))) == rows(batches(mails))


def test_a_label_may_be_a_number_of_any_kind(tmp_path: Path) -> None:
    """1.0 is what a table makes of 1 beside an empty cell."""
    file = tmp_path / "a.jsonl"
    lines = [{"text": f"w{i}", "label": label} for i, label in enumerate([1, 1.0, "0", 0.0])]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert label_names(str(file)) == ["0", "1"]


def test_a_parquet_file_may_name_its_columns(mails: str, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in Path(mails).read_text().split("\n")]
    found = [{"id": "x", "mail": row["text"], "spam": row["label"], "label": 0} for row in lines]
    file = str(tmp_path / "mails.parquet")
    pq.write_table(pa.Table.from_pylist(found), file)
    assert fingerprint(batches(f"{file}:mail:spam")) == fingerprint(batches(mails))
    with pytest.raises(ValueError, match=r"has no column 'text' and 3 other columns of strings"):
        batches(file)
    with pytest.raises(ValueError, match="names more than two columns: FILE:TEXT:LABEL"):
        batches(f"{file}:mail:spam:id")


def test_a_text_without_a_token_is_no_example(mails: str) -> None:
    """There would be no end of epochs."""

    def forgetful(texts: list[str], **options: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[] for _ in texts]}

    with pytest.raises(ValueError, match="no train example of which a token is left"):
        labelled_batches(
            mails,
            forgetful,  # type: ignore[arg-type]
            split="train",
            length=8,
            batch_size=4,
            tokens=100,
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no.jsonl", r"'no\.jsonl' is not there: give a \.jsonl or \.parquet file whose rows"),
        ("docs", r"'docs' is no \.jsonl or \.parquet file: give one whose rows have a text"),
        ("text.txt", r"'text\.txt' is no \.jsonl or \.parquet file"),
        ("hub:x", r"'hub:x' is no \.jsonl or \.parquet file"),
    ],
)
def test_what_is_no_labelled_file(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(source)
