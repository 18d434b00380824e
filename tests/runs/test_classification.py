"""A tiny encoder learns to tell texts apart, is converted, and is evaluated: the whole way."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from moe_tools.checkpoint.loading import load, load_classifier
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.data import labelled_batches
from moe_tools.experts.experts import expert_ffns
from moe_tools.measure.classify import evaluate_classifier
from moe_tools.recipe import Attach, Recipe, Split, read_recipe
from moe_tools.runs.run import run
from moe_tools.runs.text import RunText
from tests.cli.test_verbs import WORDS, build_tokenizer

RECIPE = """
name: mails
task: classify
block_length: 16
steps:
  - train: {mode: dense, tokens: 20000, lr: 3e-3, batch_size: 16}
  - split: {expert_size: 7, tokens: 512}
  - attach: {start_sparsity: 0.1, tokens: 512}
  - train: {mode: straight, tokens: 10000, target_sparsity: 0.4, lr: 1e-3, batch_size: 16}
"""
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """donor/ (a body without a head), mails.jsonl, mails.yaml, and out/, the converted run."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work")
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    save(BertModel(config), folder / "donor", build_tokenizer(WORDS))
    draw = random.Random(0)
    with (folder / "mails.jsonl").open("w") as file:
        for index in range(400):
            words = draw.choices(WORDS[2:], k=draw.randint(5, 20))
            words[draw.randint(0, 4)] = WORDS[index % 2]  # w0 or w1 decides
            file.write(json.dumps({"text": " ".join(words), "label": ["a", "b"][index % 2]}) + "\n")
    (folder / "mails.yaml").write_text(RECIPE)
    words = ["convert", "--recipe", str(folder / "mails.yaml"), "--model", str(folder / "donor")]
    text = ["--data", str(folder / "mails.jsonl"), "--dtype", "fp32", "--eval-tokens", "0"]
    assert main([*words, *text, "--output", str(folder / "out"), "--control"]) == 0
    return folder


def test_it_learned_what_the_label_is(work: Path) -> None:
    model = load(work / "out")
    held = labelled_batches(
        str(work / "mails.jsonl"), build_tokenizer(WORDS), split="heldout", length=16, batch_size=8
    )
    found = evaluate_classifier(model, held)
    assert found.accuracy is not None and found.accuracy > 0.9
    assert found.tokens == sum(len(batch.ids_BT) for batch in held)
    assert found.ffn_sparsity == pytest.approx(0.4, abs=0.05)
    right = sum(
        int((model(input_ids=batch.ids_BT).logits.argmax(-1) == batch.labels_B).sum())
        for batch in held
    )
    assert found.accuracy == right / found.tokens


def test_the_stock_class_loads_it_with_its_labels(work: Path) -> None:
    model = load(work / "out")
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.id2label == {0: "a", 1: "b"}
    assert len(expert_ffns(model)) == 2


def test_both_train_steps_go_through_the_text_in_turn(work: Path) -> None:
    steps = json.loads((work / "out" / "metrics.json").read_text())["steps"]
    control = json.loads((work / "out" / "control" / "metrics.json").read_text())
    trained = [step["trained_tokens"] for step in steps if "trained_tokens" in step]
    assert trained == [pytest.approx(20000, abs=300), pytest.approx(10000, abs=300)]
    assert control["train_tokens"] == pytest.approx(sum(trained), abs=600)


def test_what_calibrates_is_what_trains(work: Path) -> None:
    """Rows that are held out must not choose experts or routers."""
    recipe = replace(read_recipe(work / "mails.yaml"), data=str(work / "mails.jsonl"))
    text = RunText(recipe, build_tokenizer(WORDS), work / "kept", lambda: load(work / "donor"))
    rows = [row.tolist() for batch in (*text.of_step(0), *text.of_step(3)) for row in batch.ids_BT]
    packed_T = text.calibration(10**9).flatten()
    assert torch.equal(packed_T, torch.tensor([i for row in rows for i in row])[: len(packed_T)])
    assert len(text.calibration(512)) == 512 // 16
    held = labelled_batches(
        recipe.data, build_tokenizer(WORDS), split="heldout", length=16, batch_size=8
    )
    assert not {tuple(row) for row in rows} & {tuple(r.tolist()) for b in held for r in b.ids_BT}


def test_a_classifier_may_be_converted_without_training(work: Path, tmp_path: Path) -> None:
    """Whatever its calibration asks for; a text shorter than a block is one block."""
    steps = (Split(expert_size=7, tokens=64), Attach(router="mean_gate", tokens=10**5))
    recipe = Recipe("still", steps, data=str(work / "mails.jsonl"), task="classify")
    run(recipe, str(work / "out" / "control"), tmp_path / "still", dtype=torch.float32)
    assert len(expert_ffns(load(tmp_path / "still"))) == 2


def test_the_table_shows_accuracies(work: Path, capsys: Capture) -> None:
    table = ["--data", str(work / "mails.jsonl"), "--block-length", "16", "--dtype", "fp32"]
    assert main(["evaluate", str(work / "out"), *table, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    control, model = json.loads(out)  # the donor has no head: a warning, no row
    assert (control["role"], model["role"]) == ("control", "model")
    assert control["accuracy"] > 0.9 and model["accuracy"] > 0.9
    assert control["ratio_to_control"] is model["ratio_to_control"] is None
    assert "accuracy" in err and "held-out texts" in err and "no row for the donor" in err


def test_a_head_of_other_labels_is_refused(work: Path) -> None:
    with pytest.raises(ValueError, match="tells 2 classes apart, but the data has 3 labels"):
        load_classifier(str(work / "out" / "control"), ["a", "b", "c"], dtype=torch.float32)
    again = load_classifier(str(work / "out" / "control"), ["a", "b"], dtype=torch.float32)
    assert type(again).__name__ == "BertForSequenceClassification"


def test_a_language_model_and_a_classifier_do_not_compare(work: Path, capsys: Capture) -> None:
    words = ["--data", str(work / "mails.jsonl"), "--block-length", "16"]
    folders = [str(work / "out"), str(work / "donor")]
    assert main(["evaluate", *folders, *words]) == 2
    assert "classifiers and language models do not compare" in capsys.readouterr().err


def test_recipes_compare_by_accuracy(work: Path, tmp_path: Path, capsys: Capture) -> None:
    """The donor has no head, so the control is the only bar; thresholds stand on the control."""
    words = ["--data", str(work / "mails.jsonl"), "--dtype", "fp32", "--baselines", "cats"]
    folders = ["--model", str(work / "donor"), "--output", str(tmp_path / "study")]
    sparsity = ["--target-sparsity", "0.2", "0.4", "--tokens", "3000", "--json", "-"]
    assert main(["compare", str(work / "mails.yaml"), *folders, *words, *sparsity]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["series"] or row["role"] for row in rows] == [
        "control",
        *["mails"] * 2,
        *["CATS"] * 2,
    ]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert len({row["tokens"] for row in rows}) == 1
