"""Pairs of texts, and scores in place of classes: which columns they are, and how they are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from moe_tools.data import Batch, fingerprint, labelled_batches
from moe_tools.data.labelled import scored_batches
from moe_tools.data.limits import check_text
from moe_tools.data.tasks import TaskText, calibration_text
from moe_tools.hosts.inputs import model_inputs
from tests.tiny import build_pair_tokenizer, build_tokenizer, write_rows

TOKENIZER = build_pair_tokenizer()
CLS, SEP, W0 = 1, 2, 4


def rows(first: str, second: str, label: str = "label") -> list[dict[str, Any]]:
    return [
        {first: f"w{i} w{i + 1}", second: f"w{i + 2} w{i + 3} w{i + 4}", label: i % 2, "idx": i}
        for i in range(50)
    ]


def batches(source: str, **options: Any) -> list[Batch]:
    defaults = {"split": "train", "length": 16, "batch_size": 4}
    return labelled_batches(source, TOKENIZER, **(defaults | options))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question", "sentence"),
        ("question1", "question2"),
        ("question", "passage"),
    ],
)
def test_the_names_of_glue_are_known(first: str, second: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", rows(first, second))
    named = write_rows(tmp_path / "named.jsonl", rows("a", "b", "y"))
    assert fingerprint(batches(source)) == fingerprint(batches(f"{named}:a+b:y"))


def test_a_pair_is_one_row_whose_types_tell_its_texts_apart(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", rows("premise", "hypothesis"))
    for batch in batches(source):
        assert batch.types_BT is not None and batch.labels_B is not None
        for ids_T, types_T, label in zip(batch.ids_BT, batch.types_BT, batch.labels_B, strict=True):
            i = int(ids_T[1]) - W0
            first, second = [i, i + 1], [i + 2, i + 3, i + 4]
            expected = [CLS, *[w + W0 for w in first], SEP, *[w + W0 for w in second], SEP]
            assert ids_T.tolist() == expected
            assert types_T.tolist() == [0] * 4 + [1] * 4
            assert label == i % 2


def test_the_longer_text_is_cut_first(tmp_path: Path) -> None:
    long = " ".join(["w1"] * 30)
    found = [{"sentence1": f"w{i}", "sentence2": long, "label": i % 2} for i in range(40)]
    source = write_rows(tmp_path / "long.jsonl", found)
    for batch in batches(source, length=10):
        assert batch.ids_BT.shape[1] == 10
        assert batch.types_BT is not None and (batch.types_BT.sum(1) == 7).all()


def test_the_model_gets_the_types_if_it_takes_them(tmp_path: Path) -> None:
    """The two texts of a pair do not look alike to BERT; a tokenizer without types gives none."""
    source = write_rows(tmp_path / "pairs.jsonl", rows("premise", "hypothesis"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=64, num_attention_heads=2, initializer_range=0.5, **sizes)
    model = BertForSequenceClassification(config).eval()
    batch = batches(source)[0]
    logits = model(**model_inputs(model, batch)).logits
    flat = model(**model_inputs(model, batch._replace(types_BT=None))).logits
    assert not torch.allclose(logits, flat, atol=1e-4)
    plain = labelled_batches(source, build_tokenizer(), split="train", length=16, batch_size=4)
    assert all(one.types_BT is None for one in plain)


def test_types_that_a_model_does_not_have_are_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", rows("premise", "hypothesis"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=64, num_attention_heads=2, type_vocab_size=1, **sizes)
    with pytest.raises(ValueError, match=r"tells 2 texts of a pair apart, but Bert.* has 1 types"):
        check_text(BertForSequenceClassification(config), batches(source))


def test_a_first_text_is_on_one_side(tmp_path: Path) -> None:
    """MNLI has three hypotheses of a premise."""
    found = [
        {"premise": f"w{i} w{i + 1}", "hypothesis": f"w{h}", "label": h}
        for i in range(50)
        for h in range(3)
    ]
    source = write_rows(tmp_path / "three.jsonl", found)
    sides = [
        {int(ids_T[1]) for batch in batches(source, split=split) for ids_T in batch.ids_BT}
        for split in ("train", "heldout")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_pairs_calibrate_as_rows_and_texts_as_blocks(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.jsonl", rows("premise", "hypothesis"))
    pairs = calibration_text(batches(source), 8, 40)
    assert isinstance(pairs, TaskText) and 40 <= pairs.numel() < 40 + 4 * 8
    parts = list(pairs.split(3))
    assert {len(part.ids_BT) for part in parts} == {1, 3}
    assert sum(len(part.ids_BT) for part in parts) == len(pairs) == pairs.numel() // 8
    assert all(part.types_BT is not None and part.types_BT.any() for part in parts)
    assert torch.equal(pairs[:2].ids_BT, parts[0].ids_BT[:2])
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"w{i}", "label": i} for i in range(40)])
    blocks = calibration_text(batches(texts), 8, 40)
    assert isinstance(blocks, torch.Tensor) and blocks.shape == (5, 8)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"premise": "a", "hypothesis": None, "label": 1}, "", "line 1 has text in 'premise' and"),
        ({"premise": " ", "hypothesis": "a", "label": 1}, "", "none in 'premise': every row must"),
        ({"premise": "a", "hypothesis": 3, "label": 1}, ":premise+hypothesis:label", "no string"),
        ({"premise": "a", "label": 1}, ":premise+hypothesis:label", "no column 'hypothesis'"),
        ({"a": "a", "b": "b", "c": "c", "label": 1}, ":a+b+c:label", "names 3 columns, but a pair"),
        ({"premise": "a", "hypothesis": "b", "label": None}, "", "line 1 has the label None"),
    ],
)
def test_a_pair_that_is_none(
    row: dict[str, Any], columns: str, message: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "bad.jsonl", [row])
    with pytest.raises(ValueError, match=message) as error:
        batches(source + columns)
    assert "\n" not in str(error.value)


def test_rows_without_either_text_are_left_out_and_a_plus_may_be_in_a_name(tmp_path: Path) -> None:
    found = rows("premise", "hypothesis")
    whole = write_rows(tmp_path / "whole.jsonl", found)
    empty = {"premise": None, "hypothesis": "", "label": 0}
    assert fingerprint(batches(write_rows(tmp_path / "holes.jsonl", [empty, *found]))) == (
        fingerprint(batches(whole))
    )
    plus = [{"a+b": f"w{i}", "label": i % 2} for i in range(40)]
    assert batches(f"{write_rows(tmp_path / 'plus.jsonl', plus)}:a+b:label")[0].types_BT is None


def scored(source: str, split: str = "train") -> list[Batch]:
    options: dict[str, Any] = {"split": split, "length": 16, "batch_size": 4}
    return scored_batches(source, TOKENIZER, **options)


def test_scores_are_numbers_of_any_kind(tmp_path: Path) -> None:
    values = [3, 2.5, "1.25", 0.0]
    found = [{"text": f"w{i}", "label": values[i % 4]} for i in range(40)]
    source = write_rows(tmp_path / "scores.jsonl", found)
    seen = {}
    for batch in (*scored(source), *scored(source, "heldout")):
        assert batch.labels_B is not None and batch.labels_B.dtype == torch.float32
        for ids_T, label in zip(batch.ids_BT, batch.labels_B, strict=True):
            seen[int(ids_T[1]) - W0] = float(label)
    assert seen == {i: float(values[i % 4]) for i in range(40)}


@pytest.mark.parametrize("label", ["good", None, True, "nan", float("inf"), [1.0], 10**400])
def test_a_label_that_is_no_number(label: object, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "bad.jsonl", [{"text": "a", "label": label}])
    with pytest.raises(ValueError, match=r"line 1 has the label .*needs one that is a finite num"):
        scored(source)
