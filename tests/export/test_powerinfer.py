"""Files for PowerInfer: read back, they choose the neurons that ours choose, and compute as ours.

Letters: B blocks, T tokens, D width of the model, F neurons, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, MistralConfig

import moe_tools.export as exporting
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion
from moe_tools.experts.experts import expert_ffns
from moe_tools.export import powerinfer
from moe_tools.export.plan import Options
from moe_tools.export.powerinfer import plan_powerinfer
from moe_tools.export.powerinfer_file import PowerInferFile
from moe_tools.export.source import Source
from tests.export.powerinfer_models import (
    PREDICTORS,
    SIZES,
    VOCABULARY,
    llama,
    write_vocabulary,
    written,
)
from tests.families import build

IDS_BT = torch.arange(2 * 40).reshape(2, 40) * 37 % 256


def residuals(tokens: int = 400) -> Tensor:
    """residual_TD of every size: what a norm takes back."""
    return torch.randn(tokens, 64) * torch.logspace(-2, 3, tokens)[:, None]


def both(model: Any, layer: int, read: PowerInferFile, residual_TD: Tensor) -> tuple[Any, ...]:
    """mask_TF and y_TD of ours, then those of the file."""
    block = model.model.layers[layer]
    ffn, x_TD = expert_ffns(model)[layer], block.post_attention_layernorm(residual_TD)
    theirs = read.ffn(layer, x_TD, residual_TD)
    return ffn.selector(ffn.router(x_TD)), block.mlp(x_TD), theirs.chosen_TR, theirs.y_TD


def held_by_f16(model: Any) -> Any:
    """With predictors and norms of which f16 rounds nothing."""
    for layer, ffn in zip(model.model.layers, expert_ffns(model), strict=True):
        powers_D = 2.0 ** torch.randint(-3, 4, (64,))
        layer.post_attention_layernorm.weight.copy_(powers_D * torch.tensor([-1.0, 1.0]).repeat(32))
        for parameter in ffn.router.parameters():
            parameter.copy_(torch.randint(-64, 65, parameter.shape) / 512)
    return model


@pytest.mark.parametrize("activation", ["relu", "drelu"])
@pytest.mark.parametrize(
    "config",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4, "rope_theta": 500.0}],
    ids=["grouped", "tied", "ungrouped"],
)
def test_a_file_that_is_read_back_chooses_and_computes_as_ours(
    activation: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """The 1 / rms of every token included, which the file's predictors do not see."""
    model = held_by_f16(llama(activation, **config))
    plan, file = written(model, tmp_path)
    read = plan.read_back(file, torch.float32)
    for layer in range(2):
        ours_TF, y_TD, theirs_TF, their_y_TD = both(model, layer, read, residuals())
        assert 0.3 < ours_TF.float().mean() < 0.7
        assert (ours_TF != theirs_TF).sum() <= 4  # of 409,600: sums of fp32 in another order
        same_T = (ours_TF == theirs_TF).all(-1)
        torch.testing.assert_close(their_y_TD[same_T], y_TD[same_T], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read.logits(IDS_BT), model(IDS_BT).logits, rtol=1e-3, atol=1e-3)


def test_f16_rounds_predictors_near_0_alone(tmp_path: Path) -> None:
    """1 decision in 2,000 at most; where no neuron of a token is one, the FFN's output is ours."""
    model = llama()
    plan, file = written(model, tmp_path)
    read = plan.read_back(file, torch.float32)
    for layer in range(2):
        ours_TF, y_TD, theirs_TF, their_y_TD = both(model, layer, read, residuals())
        assert (ours_TF != theirs_TF).float().mean() < 5e-4
        same_T = (ours_TF == theirs_TF).all(-1)
        assert same_T.float().mean() > 0.6
        torch.testing.assert_close(their_y_TD[same_T], y_TD[same_T], rtol=1e-4, atol=1e-4)
    expected_BTV = model(IDS_BT).logits
    # a neuron on the other side of 0 is as large as any, where predictors are random: 2 to 6 %
    assert (read.logits(IDS_BT) - expected_BTV).norm() < 0.1 * expected_BTV.norm()


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_predictors_of_any_size_are_where_f16_holds_them(size: float, tmp_path: Path) -> None:
    model = llama()
    for ffn in expert_ffns(model):
        ffn.router.first.weight.mul_(size)
    plan, file = written(model, tmp_path)
    read = plan.read_back(file, torch.float32)
    # 1e-9 leaves scores within a rounding of 1/2: ours would choose none; the sign is what counts
    for layer, ffn in enumerate(expert_ffns(model)):
        residual_TD = residuals()
        x_TD = model.model.layers[layer].post_attention_layernorm(residual_TD)
        ours_TF = ffn.router.second(torch.relu(ffn.router.first(x_TD))) > 0
        theirs_TF = read.ffn(layer, x_TD, residual_TD).chosen_TR
        assert (ours_TF == theirs_TF).float().mean() > 0.9995
        assert 0.5 <= read.tensor("fc1", layer).abs().max() <= 1


def test_a_token_at_which_no_unit_answers_runs_no_neuron(tmp_path: Path) -> None:
    """PowerInfer's own threshold of 0 would run all of them: 0 is not below it."""
    model = llama()
    expert_ffns(model)[0].router.first.weight.fill_(1.0)
    plan, file = written(model, tmp_path)
    residual_TD = -torch.rand(3, 64)
    ours_TF, y_TD, theirs_TF, their_y_TD = both(
        model, 0, plan.read_back(file, torch.float32), residual_TD
    )
    assert not ours_TF.any() and not theirs_TF.any()
    assert not y_TD.any() and not their_y_TD.any()


def test_what_is_in_the_file(tmp_path: Path) -> None:
    plan, file = written(llama("drelu", tie_word_embeddings=True), tmp_path)
    assert file.read_bytes()[:4] == b"PWRI"
    with pytest.raises(ValueError, match="GGUF magic invalid"):
        gguf.GGUFReader(file)
    with file.open("r+b") as changed:
        changed.write(b"GGUF")
    reader = gguf.GGUFReader(file)
    tensors = {one.name: one for one in reader.tensors}
    for one in tensors.values():
        assert one.tensor_type.name == ("F16" if len(one.shape) > 1 else "F32")
    assert list(tensors["blk.1.ffn_down_t.weight"].shape) == [64, 1024]  # columns first
    assert list(tensors["blk.1.fc2.weight"].shape) == [16, 1024]
    assert np.array_equal(tensors["output.weight"].data, tensors["token_embd.weight"].data)
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "bamboo"
    assert said["bamboo.feed_forward_length"] == 1024
    assert said["tokenizer.ggml.tokens"] == VOCABULARY
    assert said["tokenizer.ggml.eos_token_id"] == len(VOCABULARY) - 1
    assert sum(one.n_bytes for one in tensors.values()) == plan.facts()["bytes"]
    assert plan.is_file
    assert plan.facts() == {
        "file": "bamboo",
        "type": "f16",
        "tokenizer": str(tmp_path / "words.gguf"),
        "neurons": 1024,
        "predictor_rank": 16,
        "bytes": plan.facts()["bytes"],
    }


def test_the_check_of_an_export_takes_the_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random tokens: the folder has no tokenizer of transformers."""
    monkeypatch.setattr(exporting, "TARGETS", {"powerinfer": plan_powerinfer})
    save(held_by_f16(llama()), tmp_path / "model")
    options = Options(tokenizer=str(write_vocabulary(tmp_path / "words.gguf")))
    out = tmp_path / "out.gguf"
    done = exporting.export(tmp_path / "model", out, to="powerinfer", options=options)
    assert done.figures is not None and done.figures.sets_equal is not None
    assert done.figures.sets_equal > 0.95 and done.figures.error < 1e-5
    assert out.read_bytes()[:4] == b"PWRI"
    monkeypatch.setattr(powerinfer, "THRESHOLD", 0.1)
    with pytest.raises(ValueError, match="what was written computes another model"):
        exporting.export(tmp_path / "model", tmp_path / "no.gguf", to="powerinfer", options=options)
    assert not (tmp_path / "no.gguf").exists()


def test_a_mistral_without_a_window_is_a_llama_and_bf16_is_read(tmp_path: Path) -> None:
    model = held_by_f16(llama(mistral=True)).bfloat16()
    plan, file = written(model, tmp_path)
    expected_BTV = load(tmp_path / "model", dtype=torch.float32)(IDS_BT).logits.detach()
    read_BTV = plan.read_back(file, torch.float32).logits(IDS_BT)
    torch.testing.assert_close(read_BTV, expected_BTV, rtol=1e-3, atol=1e-3)


def source(config: Any = None, **block: Any) -> Source:
    """A folder of which there is only the config."""
    known = {**PREDICTORS, "activation": {"kind": "relu"}, **block}
    return Source("model", config or LlamaConfig(**SIZES), Conversion("donor", **known))


def host(**changes: Any) -> Source:
    """The same, with another config."""
    return source(LlamaConfig(**{**SIZES, **changes}))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (Source("model", LlamaConfig(**SIZES), None), "it was not converted, .*: train predictors"),
        (source(build("qwen2").config), "it is a qwen2, .*: serve the folder itself"),
        (source(MistralConfig(**SIZES, sliding_window=64)), "it has sliding_window 64, which"),
        (host(attention_bias=True), "it has attention_bias True, which PowerInfer leaves out: s"),
        (host(mlp_bias=True), "it has mlp_bias True"),
        (
            host(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "it has rope scaling of type 'linear', and PowerInfer plain rope: serve",
        ),
        (
            host(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "it rotates 0.5 of each head",
        ),
        (host(head_dim=32), "it has 4 heads of 32, and PowerInfer 64 / 4 in each: serve"),
        (host(intermediate_size=1000), "it has 1000 neurons an FFN, and .* of 1000 or fewer for"),
        (
            host(quantization_config={"quant_method": "gptq", "bits": 4}),
            "its weights are quantised .'gptq'., n",
        ),
        (source(router=None), "it has no predictors: train predictors of single neurons with"),
        (source(router="sigmoid", router_options={}), "it has a router 'sigmoid', and PowerInfer"),
        (source(expert_size=8), "it has experts of 8 neurons, and PowerInfer single ones: train"),
        (source(router_options={}), "its predictors have a bias, .*: train .* {bias: false}"),
        (source(router_options={"bias": 0}), "its predictors have a bias"),
        (source(selector={"kind": "threshold", "tau": 0.4}), "its selector is .*0.4.*: train"),
        (source(selector={"kind": "topk", "k": 5}), "its selector is .*topk"),
        (
            source(selector_of={"model.layers.1.mlp": {"kind": "threshold", "tau": 0.4}}),
            "its selector is .*0.4.* in some FFNs",
        ),
        (source(shared_experts=3), "3 neurons always run, and in PowerInfer none does: train"),
        (source(when_off="mean"), "a neuron that is off gives its mean, and in PowerInfer 0"),
        (source(mode="soft"), r'its mode is soft, .*: give it .* `moe_tools.set_mode\(model, "har'),
        (source(constants=True), "it adds constants, .*: export the folder from before `refit`"),
        (source(thresholds={"gate": {}}), "it drops inputs of 1 linears, .* before `threshold`"),
        (
            source(activation={"kind": "fatrelu", "theta": 0.1}),
            "it has the activation 'fatrelu', and PowerInfer computes relu and drelu: `swap: {",
        ),
        (
            source(activation={"kind": "shifted_relu", "shift": 0.1}),
            "it has the activation 'shifted_relu', and",
        ),
        (source(activation={"kind": "relu2"}), "it has the activation 'relu2', and"),
        (source(activation=None), "it has the activation 'silu', and .*, and only then fit predic"),
        (
            source(activation_of={"model.layers.1.mlp": {"kind": "drelu"}}),
            "its FFNs have the activations drelu and relu, and in PowerInfer all have one: `swap",
        ),
    ],
)
def test_what_powerinfer_computes_otherwise_is_refused_by_the_config(
    given: Source, reason: str, tmp_path: Path
) -> None:
    options = Options(tokenizer=str(write_vocabulary(tmp_path / "words.gguf")))
    with pytest.raises(ValueError, match=f"^model cannot be a file for PowerInfer: {reason}") as no:
        plan_powerinfer(given, options)
    assert "\n" not in str(no.value)


def test_a_host_with_a_relu_of_its_own_is_taken(tmp_path: Path) -> None:
    given = source(LlamaConfig(**SIZES, hidden_act="relu"), activation=None)
    options = Options(tokenizer=str(write_vocabulary(tmp_path / "words.gguf")))
    assert plan_powerinfer(given, options).facts()["file"] == "llama"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_attention_heads", 0, "num_attention_heads is 0, which is no number from 1: correct"),
        ("num_hidden_layers", "two", "num_hidden_layers is 'two', which is no number"),
        ("vocab_size", True, "vocab_size is True"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3, no divisor of 4: correct config"),
        ("num_key_value_heads", "3", "num_key_value_heads is '3', no divisor"),
        ("rope_parameters", {"rope_theta": "far"}, "rope_theta is 'far', which is no number abov"),
        ("rope_parameters", {"rope_theta": float("nan")}, "rope_theta is nan"),
        ("rms_norm_eps", None, "rms_norm_eps is None, which is no number above 0"),
    ],
)
def test_a_config_of_other_words_is_refused_in_one_line(
    key: str, value: Any, reason: str, tmp_path: Path
) -> None:
    given = source()
    object.__setattr__(given.config, key, value)  # as what comes after transformers' own checks
    options = Options(tokenizer=str(write_vocabulary(tmp_path / "words.gguf")))
    with pytest.raises(ValueError, match=f"^model cannot be a file for PowerInfer: {reason}"):
        plan_powerinfer(given, options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": 0, "bias": False}, "its predictors have the rank 0, no number from 1: correct"),
        ({"rank": "many", "bias": False}, "its predictors have the rank 'many'"),
    ],
)
def test_a_rank_that_is_none_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_powerinfer(source(router_options=options), Options())


def test_options_that_say_nothing_here_are_refused() -> None:
    for options in (Options(dtype=torch.float16), Options(type="f16"), Options(top_k=3)):
        with pytest.raises(ValueError, match="says nothing about the format powerinfer: leave it"):
            plan_powerinfer(source(), options)


def test_the_tokenizer_is_that_of_the_donor_unless_one_is_named(tmp_path: Path) -> None:
    donor = write_vocabulary(tmp_path / "donor.gguf")
    known = replace(cast(Conversion, source().conversion), donor=str(donor))
    given = replace(source(), conversion=known)
    assert plan_powerinfer(given, Options()).facts()["tokenizer"] == str(donor)
    other = str(write_vocabulary(tmp_path / "other.gguf"))
    found = plan_powerinfer(given, Options(tokenizer=other))
    assert found.facts()["tokenizer"] == other
    donor.unlink()
    with pytest.raises(ValueError, match="reads no file without a tokenizer: give one by --tok"):
        plan_powerinfer(given, Options())


def test_a_tokenizer_that_powerinfer_cannot_take_is_refused(tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken.gguf", tmp_path / "empty.gguf"
    whole = write_vocabulary(tmp_path / "whole.gguf").read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    empty.write_bytes(b"")
    short = write_vocabulary(tmp_path / "short.gguf", VOCABULARY[:-2])
    kind = write_vocabulary(tmp_path / "kind.gguf", model="bert")
    cases = {
        tmp_path / "none.gguf": "none.gguf does not exist",
        broken: "broken.gguf is not a GGUF file, or damaged",
        empty: "empty.gguf is not a GGUF file, or damaged",
        short: "short.gguf has 256 tokens, but the model 258",
        kind: "kind.gguf has a tokenizer of the kind bert, and PowerInfer knows llama and gpt2",
        bare(tmp_path / "bare.gguf"): "bare.gguf has no tokenizer",
    }
    for file, reason in cases.items():
        with pytest.raises(ValueError, match=reason) as no:
            plan_powerinfer(source(), Options(tokenizer=str(file)))
        assert "\n" not in str(no.value)


def bare(file: Path) -> Path:
    """A GGUF file that says nothing of a tokenizer."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    plan, _ = written(llama(), tmp_path)
    file, given = tmp_path / "model" / "model.safetensors", Source.read(str(tmp_path / "model"))
    tensors = load_file(file)
    head, first = tensors["lm_head.weight"], "model.layers.1.mlp.router.first.weight"
    norm = "model.layers.1.post_attention_layernorm.weight"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"model.layers.0.mlp.bias_D": torch.ones(64)}, "no place for the tensors .*mlp.bias_D"),
        ({"lm_head.weight": head[:-1]}, r"lm_head.weight is \(257, 64\), and the config says"),
        ({"lm_head.weight": head + 1e6}, "lm_head.weight has the number 1000.*, which f16 does no"),
        ({"lm_head.weight": head * torch.nan}, "lm_head.weight has the number nan"),
        ({first: tensors[first] * torch.inf}, "router.first.weight has the number "),
        ({norm: tensors[norm] * torch.nan}, f"{norm} has the number nan"),
    ]
    for changes, reason in cases:
        save_file({**tensors, **changes}, file)
        with pytest.raises(ValueError, match=reason) as no:
            plan.write(given, tmp_path / "no.gguf")
        assert "\n" not in str(no.value)
        assert not (tmp_path / "no.gguf").exists() or start(tmp_path / "no.gguf") != b"PWRI"
    save_file({name: one for name, one in tensors.items() if name != first}, file)
    with pytest.raises(ValueError, match=f"the folder lacks the tensors {first}: write it again"):
        plan.write(given, tmp_path / "no.gguf")


def start(file: Path) -> bytes:
    """The first word."""
    return file.read_bytes()[:4]


def test_what_is_no_file_for_powerinfer_is_not_read(tmp_path: Path) -> None:
    _, file = written(llama(num_hidden_layers=1), tmp_path)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:5000])
    for other in (write_vocabulary(tmp_path / "plain.gguf"), cut, tmp_path / "none.gguf"):
        with pytest.raises(ValueError, match=f"cannot read {other}: "):
            PowerInferFile(other)
