"""Stock MoE folders: what transformers computes of them, and what they cannot say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.experts.conversion import Conversion, set_selectors
from moe_tools.experts.selectors import Threshold, TopK
from moe_tools.experts.swapped import swap_activations
from moe_tools.export import Options, export
from moe_tools.export import moe as moe_module
from moe_tools.export import shards as shards_module
from tests.export.hosts import HOSTS, converted, folder, host
from tests.families import load_stock, stored_shapes

ONE = {"kind": "topk", "k": 1}
IDS = torch.arange(40)[None] * 7 % 96


def stock(place: Path) -> Any:
    """The folder in transformers alone."""
    from transformers import AutoModelForCausalLM

    return load_stock(AutoModelForCausalLM, place, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("shared", [0, 2])
def test_with_every_expert_on_it_is_the_dense_model(
    family: str, shared: int, tmp_path: Path
) -> None:
    every = {"kind": "topk", "k": 8 - shared}
    folder(tmp_path / "in", family, selector=every, shared_experts=shared)
    done = export(tmp_path / "in", tmp_path / "out", to="moe")
    dense = load(tmp_path / "in", routed=False)
    model = stock(tmp_path / "out")
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    assert (logits(model) - logits(dense)).norm() <= 1e-3 * logits(dense).norm()
    assert done.figures is not None and done.figures.sets_equal == 1.0


@pytest.mark.parametrize("family", HOSTS)
def test_every_ffn_chooses_and_computes_as_ours(family: str, tmp_path: Path) -> None:
    folder(tmp_path / "in", family)
    figures = export(tmp_path / "in", tmp_path / "out", to="moe").figures
    assert figures is not None and figures.sets_equal is not None
    assert figures.sets_equal >= 0.99 and figures.error <= 2e-3
    assert figures.token_layers == 2 * 256
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written["check"]["error"] == figures.error
    assert written["experts of a token"] == 4 and written["shared experts"] == 1


def test_it_is_a_stock_folder_that_says_all_that_other_programs_read(tmp_path: Path) -> None:
    save(converted(host(tie_word_embeddings=True)), tmp_path / "tied")
    export(tmp_path / "tied", tmp_path / "out", to="moe")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Glm4MoeForCausalLM"] and "moe_tools" not in config
    assert config["tie_word_embeddings"] is False  # vLLM's class never ties
    assert config["num_nextn_predict_layers"] == config["first_k_dense_replace"] == 0
    assert config["rope_parameters"]["partial_rotary_factor"] == 1.0
    assert (config["n_routed_experts"], config["num_experts_per_tok"]) == (7, 4)
    assert (config["n_shared_experts"], config["routed_scaling_factor"]) == (1, 4.0)
    shapes = stored_shapes(tmp_path / "out")
    assert not any(".router." in name for name in shapes)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"]
    assert shapes["model.layers.0.mlp.experts.6.down_proj.weight"] == (64, 32)


def test_experts_of_two_sizes_are_filled_up(tmp_path: Path) -> None:
    save(converted(host(intermediate_size=100), selector=ONE), tmp_path / "in")  # 34, 33, 33
    figures = export(tmp_path / "in", tmp_path / "out", to="moe").figures
    assert figures is not None and figures.sets_equal == 1.0 and figures.error <= 2e-3
    assert stored_shapes(tmp_path / "out")["model.layers.1.mlp.experts.1.up_proj.weight"] == (
        40,
        64,
    )


def test_a_router_that_measures_distances_is_a_linear_one(tmp_path: Path) -> None:
    save(converted(host(), router="similarity"), tmp_path / "in")
    figures = export(tmp_path / "in", tmp_path / "out", to="moe").figures
    assert figures is not None and figures.sets_equal is not None
    assert figures.sets_equal >= 0.99 and figures.error <= 2e-3


def test_top_k_takes_the_place_of_a_threshold(tmp_path: Path) -> None:
    model = converted(host())
    set_selectors(model, [Threshold(0.5)] * 2)
    save(model, tmp_path / "in")
    with pytest.raises(ValueError, match=r"^moe: .* has the selector threshold, whose .*--top-k K"):
        export(tmp_path / "in", tmp_path / "out", to="moe")
    export(tmp_path / "in", tmp_path / "out", to="moe", options=Options(top_k=3))
    set_selectors(model, [TopK(3)] * 2)
    torch.testing.assert_close(logits(stock(tmp_path / "out")), logits(model), rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_come_in_the_dtype_that_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    folder(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out", to="moe", options=Options(dtype=dtype))
    with transformers_patched(False):
        model = load_stock(type(stock(tmp_path / "out")), tmp_path / "out")
    assert model.dtype == dtype
    assert model.model.layers[0].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_a_large_model_is_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "one", to="moe")
    monkeypatch.setattr(shards_module, "SHARD", 100_000)
    export(tmp_path / "in", tmp_path / "many", to="moe")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits(stock(tmp_path / "many")), logits(stock(tmp_path / "one")))


def test_another_model_is_found_out_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "in")
    monkeypatch.setattr(moe_module, "SCALE", 0.5)  # weights that are far from equal
    with pytest.raises(ValueError, match=r"^what was written computes another model: out"):
        export(tmp_path / "in", tmp_path / "out", to="moe")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    done = export(tmp_path / "in", tmp_path / "out", to="moe", checking=None)
    assert (
        done.figures is None
        and json.loads((tmp_path / "out" / "export.json").read_text())["check"] is None
    )


def _swapped() -> Any:
    model = host()
    swap_activations(model, Conversion("donor", activation={"kind": "relu"}))
    return converted(model, activation={"kind": "relu"})


def _per_layer() -> Any:
    model = converted(host())
    set_selectors(model, [TopK(3), TopK(4)])
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: host(), "is not converted, and a stock MoE is written of experts: `moe-tools con"),
        (lambda: converted(host("gemma")), "is a gemma, but a stock MoE is written of a llama"),
        (_swapped, "has the activation relu, where stock MoEs compute SiLU"),
        (lambda: converted(host(mlp_bias=True)), "has mlp_bias True"),
        (lambda: converted(host(attention_bias=True)), "has attention_bias on its output"),
        (lambda: converted(host("mistral", sliding_window=64)), "has sliding_window 64"),
        (lambda: converted(host(), router="mlp"), "has routers of kind mlp, which no linear"),
        (lambda: converted(host(), router="representative"), "of kind representative"),
        (lambda: converted(host(), when_off="mean"), "has when_off mean"),
        (lambda: converted(host(), constants=True), "has constants, which no stock MoE adds"),
        (lambda: converted(host(), mode="soft"), "is in mode soft, where every expert runs"),
        (_per_layer, "runs 3 to 4 experts, by the layer, where a stock MoE has one k"),
        (
            lambda: converted(host(), selector={"kind": "dynamic_k", "tau": 0.5}),
            "has the selector dynamic_k",
        ),
        (lambda: converted(host(), selector={"kind": "top_p", "p": 0.5}), "has the selector top_p"),
        (
            lambda: converted(host(), shared_experts=7, selector={"kind": "topk", "k": 1}),
            "routes 1",
        ),
    ],
)
def test_what_no_stock_moe_can_say_is_refused(
    model: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(model(), tmp_path / "in")
    words = ["export", str(tmp_path / "in"), "--to", "moe", "--output", str(tmp_path / "out")]
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == 2
        said = capsys.readouterr().err
        assert reason in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--to", "moe", "--top-k", "8"], "--top-k 8: there are 7 routed experts: 1 to 7"),
        (["--to", "moe", "--type", "q4_0"], "--type says nothing about the format moe"),
        (["--to", "dense", "--top-k", "2"], "--top-k says nothing about the format dense"),
        (["--to", "moee"], "unknown export format 'moee'; did you mean 'moe'?"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "in")
    assert main(["export", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *words]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()  # no weight is read
    words = ["--to", "moe", "--output", str(tmp_path / "out"), "--dry-run", "--json", "-"]
    assert main(["export", str(tmp_path / "in"), *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == "glm4_moe" and said["experts"] == 7 and said["check"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_that_lacks_a_router_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.router.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the router tensors model\.layers\.1\.mlp\.router"):
        export(tmp_path / "in", tmp_path / "out", to="moe")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_positions_that_a_stock_class_reads_otherwise_are_found_out(tmp_path: Path) -> None:
    """Of a llama `partial_rotary_factor` says nothing, and of a GLM4-MoE it does."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    save(converted(host(rope_parameters=rope)), tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out", to="moe")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["partial_rotary_factor"] == 1.0
    model, ours = stock(tmp_path / "out"), load(tmp_path / "in")
    assert (logits(model) - logits(ours)).norm(dim=-1).median() <= 0.01 * logits(ours).norm(
        dim=-1
    ).median()


def test_another_attention_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "in")
    common = moe_module._common
    monkeypatch.setattr(
        moe_module, "_common", lambda config: common(config) | {"rms_norm_eps": 9.0}
    )
    with pytest.raises(ValueError, match=r"another model: half of its logits .* or more"):
        export(tmp_path / "in", tmp_path / "out", to="moe")
