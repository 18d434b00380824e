"""The text of a run: the same from everywhere, before and after, and one that the donor takes."""

from __future__ import annotations

import json
import logging
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.data import labelled_batches
from moe_tools.data.limits import context_length
from moe_tools.measure.evaluate import evaluate
from moe_tools.recipe import Attach, Budget, Fit, Recipe, Split, Train, lasting_yaml, read_recipe
from moe_tools.runs.grid import Grid, explore
from moe_tools.runs.run import convert, run
from tests.tiny import WORDS, build_tokenizer, write_passages

FP32 = {"dtype": torch.float32}
STEPS = (Split(expert_size=8, tokens=256), Attach(tokens=256), Train(tokens=512, mode="soft"))
RECIPE = Recipe("tiny", STEPS, block_length=16)
Capture = pytest.CaptureFixture[str]
WIDTHS = {
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama(**changes: int) -> LlamaForCausalLM:
    options = {"vocab_size": 64, "max_position_embeddings": 64, **WIDTHS, **changes}
    return LlamaForCausalLM(LlamaConfig(**options, bos_token_id=1, eos_token_id=1))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=64, n_positions=24, n_embd=16, n_layer=2, n_head=2)
    config.bos_token_id = config.eos_token_id = 1
    return GPT2LMHeadModel(config)


def opt() -> OPTForCausalLM:
    sizes = {"hidden_size": 16, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=64, max_position_embeddings=24, word_embed_proj_dim=16, **sizes)
    return OPTForCausalLM(config)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """donor/ and text/a.txt, in the current folder."""
    torch.manual_seed(0)
    save(llama(), tmp_path / "donor", build_tokenizer())
    (tmp_path / "text").mkdir()
    write_passages(tmp_path / "text" / "a.txt", 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_of(folder: Path) -> str:
    return json.loads((folder / "metrics.json").read_text())["text"]


# --- one run has one text


def test_a_run_may_write_below_the_text_that_it_reads(work: Path) -> None:
    recipe = replace(RECIPE, data="text")
    out = run(recipe, "donor", "text/out", control=True, keep_steps=True, **FP32)
    elsewhere = run(recipe, "donor", "out", control=True, **FP32)
    assert (out / "README.md").is_file()
    assert {text_of(folder) for folder in (out, out / "control", elsewhere)} == {text_of(out)}
    again = run(recipe, "donor", "text/again", control=True, **FP32)  # beside a complete run
    assert text_of(again) == text_of(again / "control") == text_of(out)
    (out / "metrics.json").unlink()  # as if it was killed at its very end
    assert run(recipe, "donor", "text/out", control=True, keep_steps=True, **FP32) == Path(out)
    assert text_of(out) == text_of(elsewhere)


def test_a_relative_text_is_the_same_one_from_another_folder(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, data="text/a.txt")
    out = run(recipe, "donor", work / "out", **FP32)
    assert read_recipe(out / "recipe.yaml").data == str(work / "text" / "a.txt")
    other = work / "other"
    (other / "text").mkdir(parents=True)
    write_passages(other / "text" / "a.txt", 50)
    monkeypatch.chdir(other)
    with pytest.raises(ValueError, match="holds another run"):
        run(recipe, str(work / "donor"), out, **FP32)
    kept = read_recipe(out / "recipe.yaml")
    assert run(kept, str(work / "donor"), out, **FP32) == out  # it is complete


def test_a_run_that_began_with_a_relative_path_goes_on(work: Path) -> None:
    recipe = replace(RECIPE, data="text/a.txt")
    out = run(recipe, "donor", work / "out", keep_steps=True, **FP32)
    marker, whole = out / "recipe.yaml", (out / "recipe.yaml").read_text()
    old = whole.replace(str(work / "text"), "text").replace("    shared: 0\n", "")
    assert old != whole
    marker.write_text(old)
    (out / "metrics.json").unlink()
    shutil.rmtree(out / "steps" / "2-train")
    run(recipe, "donor", out, **FP32)
    assert text_of(out)
    with pytest.raises(ValueError, match="holds another run"):
        run(replace(recipe, seed=1), "donor", out, **FP32)


def test_what_is_no_recipe_any_more_stays_as_it_is() -> None:
    text = "# donor: x\nname: x\nsteps:\n- dance: {}\n"
    assert lasting_yaml(text) == text and lasting_yaml("# a: [\n{") == "# a: [\n{"


def test_the_card_keeps_paths_private(work: Path) -> None:
    out = run(replace(RECIPE, data="text/a.txt"), "donor", "out", **FP32)
    card = (out / "README.md").read_text()
    assert "data: a.txt" in card and str(work) not in card


# --- what the donor takes


@pytest.mark.parametrize("build", [gpt2, opt])
def test_blocks_are_no_longer_than_the_context(
    build: object, work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(build(), work / "short", build_tokenizer())  # type: ignore[operator]
    recipe = Recipe("tiny", STEPS[:2], data="text")
    with caplog.at_level(logging.WARNING):
        out = run(recipe, "short", "out", **FP32)
    assert read_recipe(out / "recipe.yaml").block_length == 24
    (said,) = [message for message in caplog.messages if "context" in message]
    assert "is 24 tokens: blocks have this length, and not 512" in said
    run(recipe, "short", "out", **FP32)  # resumes


def convert_words(*more: str) -> list[str]:
    words = ["convert", "--recipe", "tiny.yaml", "--output", "out", "--dtype", "fp32"]
    return [*words, "--data", "text", "--eval-tokens", "64", *more]


def test_a_length_that_the_user_gives_is_kept_or_refused(work: Path, capsys: Capture) -> None:
    save(gpt2(), work / "short", build_tokenizer())
    (work / "tiny.yaml").write_text(Recipe("tiny", STEPS[:2]).to_yaml())
    for model, context in {"short": 24, "donor": 64}.items():
        assert main(convert_words("--model", model, "--block-length", "65")) == 2
        said = capsys.readouterr().err
        assert "a block of 65 tokens exceeds the context" in said
        assert f"use --block-length {context} or less" in said
        assert not (work / "out").exists()
    with pytest.raises(ValueError, match="exceeds the context of GPT2LMHeadModel, 24 tokens"):
        convert("short", "out", block_length=25, data="text")
    assert main(convert_words("--model", "short")) == 0
    assert read_recipe(work / "out" / "recipe.yaml").block_length == 24
    assert "blocks of 24" in "".join(capsys.readouterr())
    assert main(["evaluate", "out", "--data", "text", "--dtype", "fp32", "--tokens", "64"]) == 0
    assert "blocks of 24" in "".join(capsys.readouterr())


def test_tokens_beyond_the_embedding_are_found_before_the_first_step(work: Path) -> None:
    save(llama(vocab_size=40), work / "small", build_tokenizer())
    with pytest.raises(ValueError, match=r"token 62 is outside the vocabulary of Llama.*40 tokens"):
        run(replace(RECIPE, data="text"), "small", "out", **FP32)
    assert not (work / "out").exists()


def test_held_out_text_is_checked_before_the_first_step(work: Path, capsys: Capture) -> None:
    """The last words of the text alone are beyond the embedding."""
    save(llama(vocab_size=62), work / "small", build_tokenizer())
    words = [word for word in (work / "text" / "a.txt").read_text().split() if word != "w59"]
    (work / "text" / "a.txt").write_text(" ".join([*words, *["w59"] * 40]))
    (work / "tiny.yaml").write_text(replace(RECIPE, steps=STEPS[:2]).to_yaml())
    assert main(convert_words("--model", "small", "--eval-tokens", "999")) == 2
    assert "token 62 is outside the vocabulary" in capsys.readouterr().err
    assert not (work / "out").exists()


def test_one_token_has_nothing_to_predict(work: Path) -> None:
    with pytest.raises(ValueError, match="block_length is 1, and nothing follows"):
        run(replace(RECIPE, data="text", block_length=1), "donor", "out", **FP32)
    assert not (work / "out").exists()


def test_a_donor_that_cannot_sample_is_found_before_the_first_step(work: Path) -> None:
    config = BertConfig(vocab_size=64, **WIDTHS)
    save(BertForMaskedLM(config), work / "bert", build_tokenizer())
    recipe = replace(RECIPE, steps=STEPS[:2], data="self")
    with pytest.raises(ValueError, match="is no causal language model and cannot sample"):
        run(recipe, "bert", "out", **FP32)
    assert not (work / "out").exists()


def test_positions_behind_the_padding_token_are_no_context() -> None:
    """RoBERTa's 26 positions take 24 tokens."""
    config = RobertaConfig(vocab_size=64, max_position_embeddings=26, pad_token_id=1, **WIDTHS)
    model = RobertaForMaskedLM(config)
    assert context_length(model) == 24
    evaluate(model, torch.full((1, 24), 5), mask_token=2)
    with pytest.raises(ValueError, match="a block of 25 tokens exceeds the context"):
        evaluate(model, torch.full((1, 25), 5), mask_token=2)


# --- few labelled texts


def test_a_few_short_labelled_texts_are_enough(work: Path, capsys: Capture) -> None:
    """Examples count, and not blocks of running text: the held-out ones do not fill one."""
    draw = random.Random(0)
    rows = [
        {"text": " ".join(draw.choices(WORDS, k=5)), "label": index % 2} for index in range(300)
    ]
    (work / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save(BertForMaskedLM(BertConfig(vocab_size=64, **WIDTHS)), work / "bert", build_tokenizer())
    train = Train(tokens=2000, mode="straight")
    steps = (Split(8), Attach(), Fit(epochs=1), Budget(0.5), train)
    recipe = Recipe("few", steps, task="classify")
    (work / "few.yaml").write_text(recipe.to_yaml())
    words = ["convert", "--recipe", "few.yaml", "--model", "bert", "--output", "out"]
    more = ["--data", "few.jsonl", "--dtype", "fp32", "--control", "--json", "rows.json"]
    assert main([*words, *more]) == 0, capsys.readouterr().err
    held = labelled_batches(
        "few.jsonl", build_tokenizer(), split="heldout", length=512, batch_size=4
    )
    table = json.loads((work / "rows.json").read_text())
    assert {row["tokens"] for row in table} == {sum(len(batch.ids_BT) for batch in held)}


# --- grids


def test_a_grid_may_stand_below_its_text_and_knows_it_by_either_path(work: Path) -> None:
    sizes = {"calibration": 128, "tokens": 64, "block_length": 16, **FP32}
    grid = Grid("donor", ("random",), ("oracle",), (0.5,), expert_size=8, data="text", **sizes)
    grid = replace(grid, fit=Fit(tokens=128, epochs=1))
    file = work / "text" / "grid.jsonl"
    found = explore(grid, file)
    assert explore(replace(grid, data=str(work / "text")), file) == found
    file.write_text(file.read_text().replace(str(work / "text"), "text"))  # as older ones are
    assert explore(grid, file) == found
    with pytest.raises(ValueError, match="holds another grid"):
        explore(replace(grid, seed=1), file)
