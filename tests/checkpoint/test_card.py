"""The model card: what the hub reads of it, and what people do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from moe_tools.checkpoint.card import MARK, write_card
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.experts.conversion import Conversion
from moe_tools.experts.swapped import swap_activations
from moe_tools.report.card import write_figures
from moe_tools.report.report import Role, Row
from tests.checkpoint.test_loading import convert
from tests.families import SPLIT, THRESHOLD, build

DENSE = "Without `import moe_tools` the same folder is a dense model"


def read(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(convert(conversion=replace(THRESHOLD, donor="someone/tiny")), tmp_path / "model")
    return tmp_path / "model"


def test_a_routed_folder_says_what_it_is_with_and_without_moe_tools(folder: Path) -> None:
    card = read(folder)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "base_model": "someone/tiny",
        "pipeline_tag": "text-generation",
        "tags": ["moe-tools", "activation-sparsity"],
    }
    assert "# someone/tiny, converted by moe-tools" in card.text
    assert "A router (`sigmoid`)" in card.text and "(`threshold`)" in card.text
    assert DENSE in card.text and "AutoModelForCausalLM.from_pretrained" in card.text


def test_a_refitted_folder_says_that_its_dense_model_is_worse(folder: Path) -> None:
    said = "fitted to the routers' masks: it is worse than its donor"
    assert said not in read(folder).text
    save(convert(conversion=replace(THRESHOLD, constants=True)), folder.parent / "refitted")
    assert said in read(folder.parent / "refitted").text


@pytest.mark.parametrize(
    ("family", "auto", "task"),
    [
        ("bert", "AutoModelForMaskedLM", "fill-mask"),
        ("t5-relu", "AutoModelForSeq2SeqLM", None),
    ],
)
def test_the_card_names_the_class_that_loads(
    family: str, auto: str, task: str | None, tmp_path: Path
) -> None:
    save(convert(family), tmp_path / "out")
    card = read(tmp_path / "out")
    assert f"{auto}.from_pretrained" in card.text and card.data.pipeline_tag == task


def test_a_donor_on_disk_is_no_base_model_and_its_path_is_left_out(tmp_path: Path) -> None:
    donor = str(tmp_path / "secret" / "tiny.gguf")
    save(convert(conversion=replace(THRESHOLD, donor=donor)), tmp_path / "out")
    card = read(tmp_path / "out")
    assert card.data.base_model is None
    assert "tiny.gguf" in card.text and "secret" not in card.text


HOSTILE = "x`\n\n# [a](javascript:b) <script>c</script> | $(touch d)\n---\ntags: [e]"


def test_the_name_of_a_donor_is_no_markdown(tmp_path: Path) -> None:
    donor = str(tmp_path / "models" / HOSTILE.replace("/", ""))
    save(convert(conversion=replace(THRESHOLD, donor=donor)), tmp_path / "out")
    card = read(tmp_path / "out")
    assert card.data.to_dict()["tags"] == ["moe-tools", "activation-sparsity"]
    assert "# x_ _a_javascript_b_ _script_c_script_ _ _touch d_---_tags_ _e_, conv" in card.text
    assert not any(sign in card.text.split("## ")[0] for sign in ("<script", "](", "$("))


def test_a_recipe_stays_inside_its_block(folder: Path) -> None:
    recipe = "name: |\n  x\n  ```\n  <script>\n"
    (folder / "recipe.yaml").write_text(recipe)
    write_card(folder)
    _, _, rest = (folder / "README.md").read_text().partition("````yaml\n")
    assert yaml.safe_load(rest.partition("````")[0]) == yaml.safe_load(recipe)


def test_a_split_folder_is_dense_and_a_swapped_one_needs_us(tmp_path: Path) -> None:
    model = build("llama")
    model.config.moe_tools = SPLIT.to_dict()
    save(model, tmp_path / "split")
    assert "It is a dense model, and loads without moe-tools" in read(tmp_path / "split").text
    model = build("llama")
    swap_activations(model, Conversion("donor", activation={"kind": "drelu"}))
    save(model, tmp_path / "swapped")
    assert "Without moe-tools it does not load" in read(tmp_path / "swapped").text


def test_the_card_says_who_refuses_the_folder(folder: Path, tmp_path: Path) -> None:
    relu, split = build("llama"), build("llama")
    swap_activations(relu, Conversion("donor", activation={"kind": "relu"}))
    save(relu, tmp_path / "relu")
    split.config.moe_tools = SPLIT.to_dict()
    save(split, tmp_path / "split")
    refused = "(llama.cpp, vLLM) refuse its class by name"
    assert refused in read(folder).text and refused in read(tmp_path / "relu").text
    assert "transformers loads it without moe-tools just as well" in read(tmp_path / "relu").text
    assert refused not in read(tmp_path / "split").text


def test_a_dense_folder_has_no_card(tmp_path: Path) -> None:
    save(build("llama"), tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()


def row(role: Role, **changes: Any) -> Row:
    figures = dict.fromkeys(
        ("nats_per_token", "ffn_flops", "router_flops", "total_flops", "total_dense_flops"), 1.0
    )
    return Row(
        model=role,
        role=role,
        perplexity=12.345,
        ratio_to_control=None,
        ratio_to_donor=None,
        ffn_sparsity=0.5,
        ffn_dense_flops=4.0,
        ffn_dense_bytes=8.0,
        ffn_bytes=2.0,
        scoring_bytes=0.25,
        train_tokens=None,
        tokens=1000,
        seconds=1.0,
        data="docs",
        block_length=32,
        dtype="float32",
        device="cpu",
        **figures | changes,
    )


def test_figures_and_recipe_come_into_the_card(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("# donor: /secret/place\nname: mine\nsteps: []\n")
    (folder / "metrics.json").write_text(json.dumps({"train_tokens": 4096}))
    points = [row("donor"), row("control"), row("model"), row("model", setting={"tau": 0.7})]
    write_figures(folder, points)
    text = read(folder).text
    assert "| dense donor | 12.35 | 50.0% | 0.28x | 0.50x |" in text
    assert "| dense control, trained on the same tokens |" in text
    assert text.count("| converted |") == 1
    assert "1,000 held-out tokens of `docs`, blocks of 32, float32 on cpu" in text
    assert "on cpu." in text
    write_figures(folder, [row("model", text="aa11")])
    assert "float32 on cpu; text aa11." in read(folder).text
    assert "Trained on 4,096 tokens" in text and "name: mine" in text and "secret" not in text
    assert "moe-tools convert --recipe recipe.yaml --model someone/tiny --output DIR" in text
    assert load(folder).config.moe_tools["donor"] == "someone/tiny"


def test_somebody_elses_card_is_not_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = folder / "README.md"
    assert MARK in readme.read_text()
    readme.write_text("mine")
    with pytest.raises(ValueError, match="was written by someone else: move it away first"):
        write_card(folder)
    assert main(["evaluate", str(folder), "--card"]) == 2
    assert "was written by someone else" in capsys.readouterr().err
    assert readme.read_text() == "mine"


def test_a_card_needs_one_converted_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(build("llama"), tmp_path / "out")
    assert main(["evaluate", str(tmp_path / "out"), "--card"]) == 2
    assert main(["evaluate", "a", "b", "--card"]) == 2
    said = capsys.readouterr().err
    assert "holds no converted model" in said and "--card takes one folder, not 2" in said
