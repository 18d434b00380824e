"""Pairs of texts, scores, and targets: recipes from start to end, and what is refused before."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from moe_tools.checkpoint.loading import load, load_regressor
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.data import TaskText
from moe_tools.data.labelled import scored_batches
from moe_tools.experts.experts import expert_ffns
from moe_tools.measure.regression import evaluate_regressor
from moe_tools.recipe import Attach, Fit, Recipe, Split, Train
from moe_tools.runs.run import run
from moe_tools.runs.text import RunText
from tests.families import build
from tests.tiny import WORDS, build_pair_tokenizer, build_tokenizer, write_rows

Capture = pytest.CaptureFixture[str]
RECIPE = """
name: tiny
task: {task}
block_length: 16
steps:
  - train: {{mode: dense, tokens: {tokens}, lr: 3e-3, batch_size: 16}}
  - split: {{expert_size: 8, by: activations, tokens: 512}}
  - attach: {{start_sparsity: 0.1, tokens: 512}}
  - train:
      mode: straight
      tokens: 6000
      target_sparsity: 0.3
      lr: 1e-3
      batch_size: 16
      losses: {{lm: 1.0, distill: 0.5, distill_ffn: 0.1}}
"""
FP32 = {"dtype": torch.float32}


def bert() -> BertModel:
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=64, num_attention_heads=2, **sizes))


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    config = T5Config(**sizes, **tokens, feed_forward_proj="relu", dropout_rate=0.0)
    return T5ForConditionalGeneration(config)


def convert(folder: Path, task: str, data: str, tokens: int, *more: str) -> int:
    (folder / "tiny.yaml").write_text(RECIPE.format(task=task, tokens=tokens))
    words = ["--model", str(folder / "donor"), "--output", str(folder / "out"), "--dtype", "fp32"]
    return main(["convert", "--recipe", str(folder / "tiny.yaml"), *words, "--data", data, *more])


def rows_of(capsys: Capture, *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["evaluate", *words, "--dtype", "fp32", "--block-length", "16", "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """donor/, pairs.jsonl, scored by how many words of the second text are w0, and out/."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pairs")
    save(bert(), folder / "donor", build_pair_tokenizer())
    draw, rows = random.Random(0), []
    for _ in range(300):
        second = draw.choices(WORDS[:2], k=4)
        first = draw.choices(WORDS, k=draw.randint(2, 4))
        score = float(second.count("w0"))
        rows.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "label": score})
    write_rows(folder / "pairs.jsonl", rows)
    data = str(folder / "pairs.jsonl")
    assert convert(folder, "regress", data, 25000, "--control", "--json", str(folder / "t")) == 0
    return folder


def test_a_regression_is_learned_and_converted(pairs: Path) -> None:
    model = load(pairs / "out")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    assert type(model).__name__ == "BertForSequenceClassification" and len(expert_ffns(model)) == 2
    control, row = json.loads((pairs / "t").read_text())  # the donor has no head, and no row
    assert (control["role"], row["role"]) == ("control", "model")
    for one in (control, row):
        assert one["perplexity"] is one["nats_per_token"] is one["accuracy"] is None
        assert one["tasks"]["pearson"] > 0.7 and one["tasks"]["spearman"] > 0.7
    assert row["ffn_sparsity"] == pytest.approx(0.3, abs=0.05)
    held = scored_batches(
        str(pairs / "pairs.jsonl"),
        build_pair_tokenizer(),
        split="heldout",
        length=16,
        batch_size=4,
    )
    assert evaluate_regressor(model, held).figures == pytest.approx(row["tasks"], rel=1e-5)
    metrics = json.loads((pairs / "out" / "metrics.json").read_text())["steps"]
    assert metrics[0]["history"][-1]["lm"] < 0.5 * metrics[0]["history"][0]["lm"]


def test_evaluate_knows_the_task_by_the_folder(pairs: Path, capsys: Capture) -> None:
    *_, row = rows_of(capsys, str(pairs / "out"))
    assert row["tasks"] == pytest.approx(json.loads((pairs / "t").read_text())[1]["tasks"])
    assert main(["evaluate", str(pairs / "out"), "--dtype", "fp32", "--block-length", "16"]) == 0
    said = capsys.readouterr().out
    assert "pearson" in said and "perplexity" not in said and "held-out texts of" in said


def test_the_card_and_the_plot_show_correlations(pairs: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(pairs / "out", tmp_path / "out")
    words = ["--dtype", "fp32", "--block-length", "16", "--plot", str(tmp_path / "a.svg")]
    assert main(["evaluate", str(copied), *words, "--card"]) == 0
    card = (copied / "README.md").read_text()
    correlation = json.loads((copied / "figures.json").read_text())[1]["tasks"]["pearson"]
    assert "| model | pearson |" in card and f"| converted | {correlation:.4g} |" in card
    assert (tmp_path / "a.svg").stat().st_size > 1000


def test_what_calibrates_a_pair_has_its_types(pairs: Path) -> None:
    recipe = Recipe("x", (Split(8),), data=str(pairs / "pairs.jsonl"), task="regress")
    text = RunText(recipe, build_pair_tokenizer(), pairs / "kept", bert)
    blocks = text.calibration(100)
    assert isinstance(blocks, TaskText) and 100 <= blocks.numel() < 116
    assert all(batch.types_BT is not None for batch in blocks.split(4))


def test_heads_of_other_tasks_are_refused(pairs: Path, tmp_path: Path, capsys: Capture) -> None:
    again = load_regressor(str(pairs / "out" / "control"), **FP32)
    assert again.config.problem_type == "regression"
    words = ["a", "b"]
    data = write_rows(
        tmp_path / "classes.jsonl",
        [{"text": f"w{i}", "label": words[i % 2]} for i in range(40)],
    )
    recipe = Recipe("x", (Train(tokens=64),), data=data, task="classify")
    with pytest.raises(ValueError, match="tells 1 classes apart, but the data has 2 labels"):
        run(recipe, str(pairs / "out" / "control"), tmp_path / "out", **FP32)
    classes = ["--data", data, "--task", "classify", "--block-length", "16"]
    assert main(["evaluate", str(pairs / "out"), *classes]) == 2
    assert "classes and scores do not compare" in capsys.readouterr().err
    recipe = Recipe("x", (Train(tokens=64),), data=data, task="regress")
    with pytest.raises(ValueError, match="line 1 has the label 'a': to regress, every text needs"):
        run(recipe, str(pairs / "donor"), tmp_path / "out", **FP32)
    assert not (tmp_path / "out").exists()


def test_pairs_are_classified(pairs: Path, tmp_path: Path) -> None:
    """By --task, of a recipe that says another one, and by columns that are named."""
    rows = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    named = [
        {"a": row["sentence1"], "b": row["sentence2"], "much": row["label"] > 2} for row in rows
    ]
    data = write_rows(tmp_path / "named.jsonl", [{**r, "much": int(r["much"])} for r in named])
    save(bert(), tmp_path / "donor", build_pair_tokenizer())
    options = ["--task", "classify", "--control", "--json", str(tmp_path / "t")]
    assert convert(tmp_path, "regress", f"{data}:a+b:much", 25000, *options) == 0
    control, row = json.loads((tmp_path / "t").read_text())
    assert min(control["accuracy"], row["accuracy"]) > 0.8


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """donor/, said.jsonl, whose targets are the sources' words each plus one, and out/."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("said")
    save(t5(), folder / "donor", build_tokenizer())
    draw, rows = random.Random(0), []
    for _ in range(500):
        words = [draw.randrange(8) for _ in range(draw.randint(1, 3))]
        rows.append(
            {
                "input": " ".join(f"w{w}" for w in [*words, 50 + draw.randrange(10)]),
                "target": " ".join(f"w{w + 10}" for w in words),
            }
        )
    write_rows(folder / "said.jsonl", rows)
    data = str(folder / "said.jsonl")
    assert convert(folder, "seq2seq", data, 50000, "--control", "--json", str(folder / "t")) == 0
    return folder


def test_an_encoder_decoder_is_taught_and_converted(said: Path, capsys: Capture) -> None:
    model = load(said / "out")
    assert {ffn.name.partition(".")[0] for ffn in expert_ffns(model)} == {"encoder", "decoder"}
    donor, control, row = json.loads((said / "t").read_text())
    assert donor["tasks"]["exact match"] == 0.0 and donor["perplexity"] > 30
    for one in (control, row):
        assert one["perplexity"] < 2 and one["accuracy"] is None
        assert one["tasks"]["token accuracy"] > 0.8 and one["tasks"]["exact match"] > 0.5
    assert row["ffn_sparsity"] == pytest.approx(0.3, abs=0.05)
    assert row["ratio_to_control"] == pytest.approx(row["perplexity"] / control["perplexity"])
    (*_, again) = rows_of(capsys, str(said / "out"))
    assert again["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
    (*_, whole) = rows_of(capsys, str(said / "out"), "--limit", "9999")
    assert whole["tasks"]["exact match"] > 0.5
    assert whole["tasks"]["exact match"] != row["tasks"]["exact match"]  # of more rows
    dense = rows_of(
        capsys, str(said / "donor"), "--task", "seq2seq", "--data", str(said / "said.jsonl")
    )
    assert dense[0]["tasks"] == pytest.approx(donor["tasks"])


def test_the_same_command_resumes_and_is_complete(said: Path) -> None:
    before = (said / "out" / "metrics.json").read_text()
    assert convert(said, "seq2seq", str(said / "said.jsonl"), 50000, "--control") == 0
    assert (said / "out" / "metrics.json").read_text() == before


def test_what_calibrates_the_decoder_is_what_it_says(said: Path) -> None:
    recipe = Recipe("x", (Split(8),), data=str(said / "said.jsonl"), task="seq2seq")
    text = RunText(recipe, build_tokenizer(), said / "kept", t5)
    blocks = text.calibration(200)
    assert isinstance(blocks, TaskText) and 200 <= blocks.numel() < 230
    for batch in blocks.split(4):
        assert batch.mask_BT is None and (batch.next_labels_BT() >= 0).all()
        assert (batch.next_labels_BT()[:, -1] == 1).all()


def test_predictors_are_fitted_on_both_sides(said: Path, tmp_path: Path) -> None:
    """MoEfication on T5, whose calibration is the task's own sources and targets."""
    steps = (
        Split(8, method="kmeans", by="weights"),
        Attach("mlp", selector={"kind": "topk", "share": 0.5}),
        Fit(tokens=2048, epochs=2),
    )
    recipe = Recipe("moe", steps, data=str(said / "said.jsonl"), task="seq2seq", block_length=16)
    out = run(recipe, str(said / "out" / "control"), tmp_path / "out", **FP32)
    assert len(expert_ffns(load(out))) == 2


def test_kinds_of_models_that_a_task_is_not_for(said: Path, pairs: Path, tmp_path: Path) -> None:
    data = str(said / "said.jsonl")
    save(build("llama"), tmp_path / "llama", build_tokenizer())
    train = (Train(tokens=64),)
    mistakes: list[tuple[Recipe, str, str]] = [
        (Recipe("x", train, data=data, task="seq2seq"), "llama", "LlamaForCausalLM is no encoder-"),
        (Recipe("x", train, data=data), "t5", "is an encoder-decoder, and does not learn the next"),
        (Recipe("x", train, data="self", task="seq2seq"), "t5", "data is 'self', samples of the"),
        (Recipe("x", train, data="docs", task="seq2seq"), "t5", "'docs' is no .jsonl or .parquet"),
    ]
    save(t5(), tmp_path / "t5", build_tokenizer())
    for recipe, model, message in mistakes:
        with pytest.raises(ValueError, match=message):
            run(recipe, str(tmp_path / model), tmp_path / "out", **FP32)
        assert not (tmp_path / "out").exists()
    endless = t5()
    endless.config.decoder_start_token_id = None
    save(endless, tmp_path / "endless", build_tokenizer())
    with pytest.raises(ValueError, match="has no decoder_start_token_id, from which targets are"):
        run(mistakes[0][0], str(tmp_path / "endless"), tmp_path / "out", **FP32)


def test_a_table_of_targets_is_of_encoder_decoders(
    said: Path, tmp_path: Path, capsys: Capture
) -> None:
    save(build("llama"), tmp_path / "llama", build_tokenizer())
    words = ["--task", "seq2seq", "--data", str(said / "said.jsonl"), "--block-length", "16"]
    assert main(["evaluate", str(tmp_path / "llama"), *words]) == 2
    assert "is no encoder-decoder, and says no targets: leave" in capsys.readouterr().err
