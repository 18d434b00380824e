"""Converted models as llama.cpp's `glm4moe`: the file, and what is refused before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.experts.conversion import Conversion
from moe_tools.experts.swapped import swap_activations
from moe_tools.export import Options, export
from moe_tools.export import gguf as gguf_module
from tests.export.hosts import HOSTS, converted, donor_gguf, folder, host


@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_every_ffn_chooses_and_computes_as_ours(family: str, kind: Any, tmp_path: Path) -> None:
    folder(tmp_path / "in", family)
    done = export(tmp_path / "in", tmp_path / "m.gguf", to="gguf", options=Options(type=kind))
    figures = done.figures
    assert figures is not None and figures.sets_equal is not None
    assert figures.sets_equal >= 0.99 and figures.error <= 1e-5
    assert (tmp_path / "m.gguf.export.json").is_file()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_routers_stay_exact_where_weights_are_rounded(kind: Any, tmp_path: Path) -> None:
    folder(tmp_path / "in")
    done = export(tmp_path / "in", tmp_path / "m.gguf", to="gguf", options=Options(type=kind))
    figures, types = done.figures, GGMLQuantizationType
    assert figures is not None and figures.sets_equal is not None and figures.sets_equal >= 0.99
    assert 1e-4 < figures.error < (0.02 if kind == "q8_0" else 0.3)
    for tensor in GGUFReader(tmp_path / "m.gguf").tensors:
        exact = len(tensor.shape) == 1 or "gate_inp" in tensor.name
        assert tensor.tensor_type == (types.F32 if exact else types[kind.upper()])


def test_the_file_says_all_that_llama_cpp_reads(tmp_path: Path) -> None:
    folder(tmp_path / "in", "qwen3")
    export(tmp_path / "in", tmp_path / "m.gguf", to="gguf")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    said = {
        key.removeprefix("glm4moe."): field.contents()
        for key, field in fields.items()
        if key.startswith("glm4moe.")
    }
    assert said["expert_count"] == 7 and said["expert_used_count"] == said["expert_weights_scale"]
    assert said["expert_gating_func"] == 3 and said["expert_weights_norm"] is True
    assert said["expert_shared_count"] == 1 and said["expert_feed_forward_length"] == 32
    assert said["leading_dense_block_count"] == said["nextn_predict_layers"] == 0
    assert said["rope.dimension_count"] == said["attention.key_length"] == 32
    assert fields["tokenizer.ggml.model"].contents() == "none"


def test_the_tokenizer_is_that_of_the_donor(tmp_path: Path) -> None:
    save(converted(host(vocab_size=49152), donor=str(donor_gguf())), tmp_path / "in")
    export(tmp_path / "in", tmp_path / "m.gguf", to="gguf", checking=None)
    theirs, ours = GGUFReader(donor_gguf()).fields, GGUFReader(tmp_path / "m.gguf").fields
    keys = [key for key in theirs if key.startswith("tokenizer.")]
    assert len(keys) > 8
    for key in keys:
        assert ours[key].types == theirs[key].types
        assert ours[key].contents() == theirs[key].contents()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("sizes", "changes", "words", "reason"),
    [
        (
            {"intermediate_size": 1024},
            {"selector": {"kind": "topk", "k": 25}},
            [],
            "runs 25 routed experts a token, and llama.cpp ends its process above 24",
        ),
        (
            {"intermediate_size": 1040},
            {"expert_size": 1, "selector": {"kind": "topk", "k": 8}},
            [],
            "has 1039 experts, and llama.cpp takes 1024 at most",
        ),
        ({"rope_parameters": LLAMA3}, {}, [], "has rope scaling of type llama3, which llama.cpp's"),
        (
            {},
            {"expert_size": 16},
            ["--type", "q4_0"],
            "has experts of 16 neurons, and q4_0 stores whole groups of 32: --type f16",
        ),
        ({}, {}, ["--dtype", "bf16"], "--dtype says nothing about the format gguf"),
        ({}, {}, ["--tokenizer", "nowhere.gguf"], "--tokenizer nowhere.gguf does not exist"),
        (
            {},
            {"selector": {"kind": "threshold", "tau": 0.5}},
            [],
            "has the selector threshold, whose number of experts depends on the token",
        ),
    ],
    ids=["k", "experts", "rope", "groups", "dtype", "tokenizer", "threshold"],
)
def test_what_llama_cpp_cannot_do_is_refused(
    sizes: Any,
    changes: Any,
    words: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(converted(host(**sizes), **changes), tmp_path / "in")
    given = ["export", str(tmp_path / "in"), "--to", "gguf", "--output", str(tmp_path / "m.gguf")]
    assert main([*given, *words]) == 2
    said = capsys.readouterr().err
    assert reason in said and len(said.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder(tmp_path / "in")
    (tmp_path / "text.gguf").write_text("not a file of llama.cpp's")
    writer = GGUFWriter(tmp_path / "none.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    for file, reason in (
        (donor_gguf(), "has 49152 tokens, but the model 96"),
        (tmp_path / "text.gguf", "is not a GGUF file, or damaged"),
        (tmp_path / "none.gguf", "has no tokenizer: give a GGUF file of the donor"),
    ):
        with pytest.raises(ValueError, match=reason):
            options = Options(tokenizer=str(file))
            export(tmp_path / "in", tmp_path / "m.gguf", to="gguf", options=options)


def test_a_relu_llama_is_refused_where_llama_cpp_computes_silu(tmp_path: Path) -> None:
    model = host()
    swap_activations(model, Conversion("donor", activation={"kind": "relu"}))
    save(model, tmp_path / "in")
    with pytest.raises(ValueError, match=r"this one has the activation relu, where llama\.cpp"):
        export(tmp_path / "in", tmp_path / "m.gguf", to="gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.layer_norm_rms_epsilon", 9.0), ("rope.freq_base", 3.0)],
)
@pytest.mark.parametrize("routed", [False, True])
def test_numbers_that_the_file_says_wrongly_are_found_out(
    routed: bool, key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(converted(host(head_dim=32)) if routed else host(), tmp_path / "in")
    common = gguf_module._common
    monkeypatch.setattr(gguf_module, "_common", lambda config: common(config) | {key: value})
    with pytest.raises(ValueError, match="what was written computes another model"):
        export(tmp_path / "in", tmp_path / "m.gguf", to="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_is_there_stays(tmp_path: Path) -> None:
    folder(tmp_path / "in")
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(ValueError, match="is a folder, and one file is written"):
        export(tmp_path / "in", tmp_path / "m.gguf", to="gguf")
    (tmp_path / "n.gguf.export.json").write_text("mine")
    with pytest.raises(ValueError, match=r"n\.gguf\.export\.json exists"):
        export(tmp_path / "in", tmp_path / "n.gguf", to="gguf")
    assert (tmp_path / "n.gguf.export.json").read_text() == "mine"
