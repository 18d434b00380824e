"""The dense folder of a converted model's weights, for programs that know nothing of routers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.swapped import swap_activations
from moe_tools.export import export
from tests.checkpoint import test_composite as composite
from tests.families import (
    THRESHOLD,
    build,
    load_stock,
    logits,
    randomize,
    routed,
    stock,
    stored_shapes,
)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt", "mixtral"])
def test_a_dense_folder_is_the_stock_model_of_the_same_weights(family: str, tmp_path: Path) -> None:
    dense = build(family)
    model, _ = routed(dense)
    randomize(model)
    save(model, tmp_path / "converted")
    assert main(["export", str(tmp_path / "converted"), "--output", str(tmp_path / "dense")]) == 0
    save(dense, tmp_path / "donor")
    shapes = stored_shapes(tmp_path / "dense")
    assert shapes == stored_shapes(tmp_path / "donor")
    text = (tmp_path / "dense" / "config.json").read_text()
    assert "moe_tools" not in text
    assert json.loads(text)["architectures"] == [type(dense).__name__]
    assert not (tmp_path / "dense" / "README.md").exists()
    torch.testing.assert_close(
        logits(stock(family, tmp_path / "dense")), logits(dense), rtol=1e-5, atol=1e-5
    )


def test_a_model_of_pictures_and_text_keeps_nothing_in_any_part(tmp_path: Path) -> None:
    model = composite.donor()
    before = composite.logits(model)
    attach_experts(model, THRESHOLD)
    save(model, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "dense")
    assert "moe_tools" not in (tmp_path / "dense" / "config.json").read_text()
    exported = load_stock(type(model), tmp_path / "dense").eval()
    exported.set_attn_implementation("eager")
    torch.testing.assert_close(composite.logits(exported), before, rtol=1e-5, atol=1e-5)


def test_a_stock_activation_comes_along_under_a_class_that_no_other_program_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a llama most of them compute SiLU, whatever the config says."""
    model = build("llama")
    swap_activations(model, Conversion("donor", activation={"kind": "relu"}))
    attach_experts(model, replace(THRESHOLD, activation={"kind": "relu"}))
    randomize(model)
    save(model, tmp_path / "relu")
    export(tmp_path / "relu", tmp_path / "dense")
    assert "its activation is relu" in caplog.text
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["architectures"] == ["MoeToolsLlamaForCausalLM"]
    assert config["moe_tools"]["router"] is config["moe_tools"]["expert_size"] is None
    assert not any(".router." in name for name in stored_shapes(tmp_path / "dense"))
    exported = stock("llama", tmp_path / "dense")
    assert exported.config.hidden_act == "relu"
    expected = logits(load(tmp_path / "relu", routed=False))
    assert torch.equal(logits(exported), expected)
    save(load(tmp_path / "dense"), tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["architectures"] == config["architectures"]


def test_an_activation_of_ours_is_refused(tmp_path: Path) -> None:
    drelu = build("llama")
    swap_activations(drelu, Conversion("donor", activation={"kind": "drelu"}))
    save(drelu, tmp_path / "drelu")
    with pytest.raises(ValueError, match="has the activation drelu, which no stock class computes"):
        export(tmp_path / "drelu", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_constants_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    attach_experts(model, replace(THRESHOLD, constants=True))
    save(model, tmp_path / "refitted")
    with pytest.raises(
        ValueError, match=r"was refitted to the masks .* with constants that no sto"
    ):
        export(tmp_path / "refitted", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_there_stays_and_an_unknown_format_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(build("llama"), tmp_path / "model")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    words = ["export", str(tmp_path / "model"), "--output"]
    assert main([*words, str(tmp_path / "there")]) == 2
    assert (tmp_path / "there" / "mine").read_text() == "mine"
    assert main([*words, str(tmp_path / "new"), "--to", "dens"]) == 2
    assert "unknown export format 'dens'; did you mean 'dense'?" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
