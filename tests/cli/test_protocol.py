"""`--protocol`: perplexity as the papers measure it, with everything that a table shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import LlamaForSequenceClassification

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.data import fingerprint
from moe_tools.data.protocols import protocol_windows
from moe_tools.measure.evaluate import evaluate
from tests.families import build
from tests.tiny import Run, build_tokenizer, passages

FP32 = ("--dtype", "fp32", "--json", "-")
COPY = ("--protocol", "ptb", "--data", "text.txt", "--block-length", "64")
SENTENCES = passages(300)[200:]
"""What the hub has: not what text.txt has."""


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_rows(name: str, config: str | None, **options: Any) -> Any:
        assert (name, options["split"]) == ("ptb-text-only/ptb_text_only", "test")

        def rows() -> Iterator[dict[str, str]]:
            yield from ({"sentence": row} for row in SENTENCES)

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_rows)


def rows_of(run: Run, *words: str) -> list[dict[str, Any]]:
    code, out, err = run("evaluate", *words, *FP32)
    assert code == 0, err
    return json.loads(out)


def test_all_rows_are_of_the_same_windows(run: Run, work: Path) -> None:
    rows = rows_of(run, "out", *COPY, "--stride", "16")
    assert [row["role"] for row in rows] == ["donor", "control", "model"]
    source = str(work / "text.txt")
    windows = protocol_windows("ptb", build_tokenizer(), length=64, stride=16, source=source)
    for row, folder in zip(rows, ("donor", "out/control", "out"), strict=True):
        expected = evaluate(load(work / folder), windows, stride=16)
        assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
        assert row["ffn_sparsity"] == pytest.approx(expected.ffn_sparsity)
        assert row["total_flops"] == pytest.approx(expected.flops.total)
        assert row["ffn_bytes"] == pytest.approx(expected.traffic[1].ffn)
        assert row["tokens"] == expected.tokens == 64 + 16 * (len(windows) - 1) - 1
        assert (row["protocol"], row["stride"], row["data"]) == ("ptb", 16, "text.txt")
        assert (row["block_length"], row["text"]) == (64, fingerprint(windows))
        assert row["ratio_to_donor"] is None or row["ratio_to_donor"] == pytest.approx(
            row["perplexity"] / rows[0]["perplexity"]
        )


def test_the_table_says_which_protocol_it_was(run: Run) -> None:
    code, out, err = run("evaluate", "out", *COPY, "--stride", "16", "--dtype", "fp32")
    said = " ".join(out.split())
    assert code == 0 and err == ""
    assert "tokens of ptb from text.txt (text " in said
    assert "windows of 64 at a stride of 16, float32 on cpu" in said and "held-out" not in said
    code, out, _ = run("evaluate", "out", *COPY, "--tokens", "128", "--dtype", "fp32")
    assert "126 tokens of the first 128 tokens of ptb from text.txt" in " ".join(out.split())


def test_without_a_protocol_nothing_has_changed(run: Run) -> None:
    words = ("--data", "text.txt", "--tokens", "128", "--block-length", "16")
    *_, row = rows_of(run, "out", *words)
    assert (row["protocol"], row["stride"], row["tokens"]) == ("", None, 8 * 15)


def test_the_text_comes_from_the_hub(run: Run, work: Path) -> None:
    *_, row = rows_of(run, "out", "--protocol", "ptb")
    file = work / "sentences.txt"
    file.write_text("\n".join(SENTENCES))
    windows = protocol_windows("ptb", build_tokenizer(), source=str(file))
    assert row["text"] == fingerprint(windows) and row["block_length"] == 2048
    assert row["data"] == "hub:ptb-text-only/ptb_text_only:penn_treebank/test/0000.parquet"


def test_baselines_and_the_control_are_of_the_same_windows(run: Run, work: Path) -> None:
    bars = ("--baselines", "teal", "griffin", "int8", "--budgets", "0.5")
    rows = rows_of(run, "out", *COPY, "--stride", "16", *bars, "--after", "32")
    assert [row["series"] for row in rows] == ["", "", "", "TEAL", "GRIFFIN", "dense int8"]
    assert len({(row["text"], row["tokens"], row["after"], row["protocol"]) for row in rows}) == 1
    teal, griffin, _ = rows[3:]
    assert teal["ratio_to_control"] == pytest.approx(teal["perplexity"] / rows[1]["perplexity"])
    assert griffin["ffn_sparsity"] == pytest.approx(0.5, abs=0.05)
    # 48 of the first window are after the prompt's 32 tokens, and 16 of each other
    windows = protocol_windows(
        "ptb", build_tokenizer(), length=64, stride=16, source=str(work / "text.txt")
    )
    assert teal["tokens"] == 32 + 16 * (len(windows) - 1)


def test_a_sweep_and_a_card(run: Run, work: Path) -> None:
    donor, control, *points = rows_of(run, "out", *COPY, "--sweep", "0.1", "0.9")
    assert [point["setting"] for point in points] == [{"tau": 0.1}, {"tau": 0.9}]
    assert len({row["text"] for row in (donor, control, *points)}) == 1
    rows_of(run, "out", *COPY, "--stride", "16", "--card")
    card = (work / "out" / "README.md").read_text()
    assert "tokens of ptb from `text.txt`, windows of 64 at a stride of 16, float32" in card


def test_recipes_are_compared_by_a_protocol(run: Run, work: Path) -> None:
    (work / "split.yaml").write_text(
        "name: split\nblock_length: 16\nsteps:\n- split: {method: random}\n"
        "- attach: {start_sparsity: 0.1, tokens: 256}\n"
        "- budget: {target_sparsity: 0.4, tokens: 256}\n"
    )
    words = ("--model", "donor", "--output", "study", "--data", "text.txt", "--dtype", "fp32")
    protocol = ("--protocol", "ptb", "--eval-length", "64", "--stride", "16")
    targets = ("--target-sparsity", "0.3", "--baselines", "teal")
    code, out, err = run("compare", "split.yaml", *words, *protocol, *targets, "--json", "-")
    assert code == 0, err
    rows = json.loads(out)
    file = work / "sentences.txt"
    file.write_text("\n".join(SENTENCES))
    windows = protocol_windows("ptb", build_tokenizer(), length=64, stride=16, source=str(file))
    assert [row["series"] for row in rows] == ["", "split", "TEAL"]
    assert {row["text"] for row in rows} == {fingerprint(windows)}
    assert {(row["protocol"], row["stride"], row["block_length"]) for row in rows} == {
        ("ptb", 16, 64)
    }
    expected = evaluate(load(work / "donor"), windows, stride=16)
    assert rows[0]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    # the same runs, by a copy of the text
    copy = ("--eval-data", "text.txt", "--eval-length", "64", "--protocol", "ptb")
    code, out, err = run("compare", "split.yaml", *words, *copy, *targets, "--json", "-")
    assert code == 0, err
    assert json.loads(out)[0]["data"] == "text.txt"


@pytest.fixture(scope="module")
def hosts(work: Path) -> Path:
    """Models that continue no text."""
    tokenizer, host = build_tokenizer(), build("llama")
    save(build("bert"), work / "masked", tokenizer)
    save(build("t5-gated"), work / "both", tokenizer)
    save(build("llama", max_position_embeddings=64), work / "short", tokenizer)
    host.config.num_labels = 3
    save(LlamaForSequenceClassification(host.config), work / "classifier", tokenizer)
    return work


MISTAKES = {
    "an encoder": (
        ("masked", *COPY),
        "masked (BertForMaskedLM) does not continue text, and --protocol ptb is the perplexity of "
        "models that do: leave it out",
    ),
    "an encoder-decoder": (
        ("both", *COPY),
        "both (T5ForConditionalGeneration) does not continue text, and --protocol ptb is",
    ),
    "a classifier": (
        ("classifier", *COPY),
        "classifiers have an accuracy, and --protocol ptb is a perplexity: leave it out",
    ),
    "a second folder of a shorter context": (
        ("out", "short", "--protocol", "ptb", "--data", "text.txt"),
        "a block of 2048 tokens exceeds the context of LlamaForCausalLM, 64 tokens: use "
        "--block-length 64 or less",
    ),
    "a second folder": (("out", "masked", *COPY), "masked (BertForMaskedLM) does not continue"),
    "a stride alone": (
        ("out", "--stride", "8"),
        "--stride is of a protocol: add --protocol (wikitext2, wikitext103, c4, ptb)",
    ),
    "a stride beyond the window": (
        ("out", *COPY, "--stride", "65"),
        "a stride of 65 leaves tokens out between windows of 64: --stride is a number from 1 to 64",
    ),
    "a stride and the second half": (
        ("out", *COPY, "--stride", "48", "--baselines", "griffin"),
        "windows of 64 at a stride of 48 predict their last 48 tokens, and not those after the "
        "first 32: --stride is at most 32, or --after at most 16",
    ),
    "a short text": (
        ("out", "--protocol", "ptb", "--data", "short.txt"),
        "short.txt has 30 tokens, one window of ptb needs 2048: use a smaller --block-length, or "
        "the whole text",
    ),
    "a window beyond the context": (
        ("out", "--protocol", "ptb", "--block-length", "4096"),
        "a block of 4096 tokens exceeds the context of",
    ),
    "held-out text": (
        ("out", "--protocol", "ptb", "--data", "docs"),
        "'docs' is no copy of ptb: use a file, a folder or hub:NAME, or name no copy, to read "
        "hub:ptb-text-only/ptb_text_only:penn_treebank/test/0000.parquet",
    ),
    "no such copy": (("out", "--protocol", "ptb", "--data", "gone.txt"), "'gone.txt' is not there"),
    "a copy of another kind": (
        ("out", "--protocol", "c4", "--data", "c4.json.gz"),
        "'c4.json.gz' is no .raw, .txt, .md, .jsonl, .parquet file",
    ),
    "BOS of no tasks": (("out", "--bos"), "--bos is of the prompts of tasks: name some by --tasks"),
    "an unknown protocol": (("out", "--protocol", "lambada"), "invalid choice: 'lambada'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_a_model_is_loaded(
    name: str, run: Run, hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("moe_tools.report.compare.load", no_weights)
    (hosts / "short.txt").write_text(passages(1)[0])
    (hosts / "c4.json.gz").write_bytes(b"\x1f\x8b")
    words, said = MISTAKES[name]
    code, out, err = run("evaluate", *words, "--dtype", "fp32")
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--stride", "--eval-data", "--eval-length"])
def test_compare_has_them_with_a_protocol_alone(option: str, run: Run) -> None:
    words = ("compare", "lte", "--model", "donor", "--output", "new", option, "8")
    code, _, err = run(*words)
    assert code == 2 and f"moe-tools: {option} is of a protocol: add --protocol (" in err
