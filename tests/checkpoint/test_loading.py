"""Folders: what comes back from disk, and one clear error for each way a folder can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moe_tools.checkpoint.loading import load, load_tokenizer
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, read_conversion, set_mode, write_conversion
from moe_tools.experts.experts import every_expert_on, expert_ffns
from moe_tools.names import INDEX, SINGLE
from tests.families import THRESHOLD, aligned, build, logits, randomize, routed, said, stored_shapes
from tests.tiny import build_tokenizer

ROUTER = "model.layers.1.mlp.router.bias"
UP = "model.layers.1.mlp.up_proj.weight"


def convert(family: str = "llama", conversion: Conversion = THRESHOLD) -> PreTrainedModel:
    model, ffns = routed(build(family), conversion)
    randomize(model)
    for ffn in ffns:
        if ffn.off_F is not None:
            ffn.off_F.normal_()
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted llama on disk."""
    save(convert(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in many shards."""
    shard(monkeypatch)
    save(convert(), tmp_path / "sharded")
    return tmp_path / "sharded"


def shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the shards of every saved model tiny."""
    small = partialmethod(PreTrainedModel.save_pretrained, max_shard_size="4KB")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", small)


def edit_tensors(path: Path, **changes: Tensor | None) -> None:
    """Rewrites a safetensors file; a tensor that becomes None is left out."""
    tensors = load_file(path) | changes
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("mode", ["soft", "straight", "hard"])
@pytest.mark.parametrize("when_off", ["zero", "mean"])
@pytest.mark.parametrize(
    "selector", [{"kind": "threshold", "tau": 0.4}, {"kind": "topk", "k": 2}], ids=["tau", "topk"]
)
def test_a_folder_remembers_the_whole_conversion(
    mode: str, when_off: str, selector: dict[str, Any], tmp_path: Path
) -> None:
    model = convert("llama", replace(THRESHOLD, when_off=when_off, selector=selector))
    set_mode(model, mode)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert read_conversion(loaded) == read_conversion(model)
    assert torch.equal(logits(aligned(loaded)), logits(model))
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "t5-gated", "mixtral"])
def test_a_sharded_model_loads_like_a_whole_one(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convert(family)
    save(model, tmp_path / "whole")
    shard(monkeypatch)
    save(model, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert (tmp_path / "sharded" / INDEX).is_file()
    assert stored_shapes(tmp_path / "sharded") == stored_shapes(tmp_path / "whole")
    assert torch.equal(logits(aligned(load(tmp_path / "sharded"))), logits(model))


def test_a_dense_folder_loads_dense(tmp_path: Path) -> None:
    donor = build("llama")
    donor.save_pretrained(tmp_path / "donor")
    loaded = load(str(tmp_path / "donor"))
    assert type(loaded) is type(donor)
    assert read_conversion(loaded) is None
    assert torch.equal(logits(aligned(loaded)), logits(donor))


def test_a_reordered_model_loads_dense_with_its_block(tmp_path: Path) -> None:
    model = build("llama")
    write_conversion(model, Conversion("donor", 8))
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert not expert_ffns(loaded)
    assert said(loaded) == Conversion("donor", 8)


def test_the_head_of_the_saved_class_comes_back(tmp_path: Path) -> None:
    save(convert("bert"), tmp_path / "out")
    assert type(load(tmp_path / "out")).__name__ == "BertForMaskedLM"


@pytest.mark.parametrize("family", ["llama", "t5-gated"])
def test_dtype_is_of_the_host_only(family: str, tmp_path: Path) -> None:
    save(convert(family), tmp_path / "out")
    loaded = load(tmp_path / "out", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for ffn in expert_ffns(loaded):
        assert ffn.weights().up_FD.dtype == torch.bfloat16
        assert {parameter.dtype for parameter in ffn.router.parameters()} == {torch.float32}
    assert logits(loaded).isfinite().all()


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    model = convert("mixtral")
    expected, names = logits(model), list(model.state_dict())
    save(model, tmp_path / "out")
    assert torch.equal(logits(model), expected)
    assert list(model.state_dict()) == names


def test_a_trained_model_is_saved_again(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    save(model, tmp_path / "again")
    assert torch.equal(logits(aligned(load(tmp_path / "again"))), logits(aligned(model)))


def test_the_transformers_log_is_quiet_only_meanwhile(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    save(load(folder), tmp_path / "again")
    with pytest.raises(ValueError, match="cannot load"):
        load(tmp_path / "nothing")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    printed = capfd.readouterr()
    assert not printed.out + printed.err


# Where nothing is to be found


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    with pytest.raises(ValueError, match=f"^cannot load {path}: no such folder, and as a hub id: "):
        load(path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path} lacks {SINGLE}: the folder is incomplete$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "pytorch_model.bin",
            "has its weights as a pickle alone, pytorch_model.bin, ",
        ),
        (
            "adapter_model.safetensors",
            "holds adapters alone, and no model: load them on",
        ),
        ("tiny-Q4_0.gguf", "holds GGUF files: give one of them, e.g. .*/tiny-Q4_0.gguf$"),
    ],
)
def test_weights_of_another_kind_are_named(file: str, message: str, tmp_path: Path) -> None:
    build("llama").config.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=f"^{tmp_path} {message}"):
        load(tmp_path)


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.gguf does not exist: give a GGUF file"):
        load(tmp_path / "x.gguf")


def test_a_gguf_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"hello" * 100)
    with pytest.raises(ValueError, match=f"{path}.* not a GGUF file"):
        load(path)


# Where the config is wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 4, "new": 1}, "config.json has moe_tools format 4; this version reads 1 to 3"),
        ({"selecter": None}, "unknown key .* 'selecter'; did you mean 'selector'"),
        ({"router": "sigmod"}, "unknown router 'sigmod'; did you mean 'sigmoid'"),
        ({"selector": {"kind": "threshhold"}}, "unknown selector .* did you mean 'threshold'"),
        ({"selector": None}, "a routed model needs a router and a selector"),
        ({"expert_size": 49}, "layers.0.mlp has 48 neurons: experts of 49 are not possible"),
        ({"expert_size": 7}, r"layers.0.mlp.router.bias is \(6,\), expected \(7,\)"),
        ({"expert_size": 12}, r"layers.0.mlp.router.bias is \(6,\), expected \(4,\)"),
        ({"when_off": "mean"}, "lacks the router tensors model.layers.0.mlp.off_F"),
        ({"constants": True}, "lacks the router tensors model.layers.0.mlp.bias_D, .*mlp.off_RD"),
    ],
    ids=[
        "newer",
        "key",
        "router",
        "selector",
        "no-selector",
        "too-large",
        "uneven",
        "size",
        "when_off",
        "constants",
    ],
)
def test_a_wrong_block(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, moe_tools=THRESHOLD.to_dict() | changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_block_that_is_no_block(folder: Path) -> None:
    edit_config(folder, moe_tools="yes")
    with pytest.raises(ValueError, match=r"the moe_tools block .* is no mapping: 'yes'"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", ""], ids=["cut", "list", "empty"])
def test_a_config_that_is_no_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"^cannot load {folder}: "):
        load(folder)


def test_a_config_that_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=f"^cannot load {folder}: "):
        load(folder)


def test_a_host_that_transformers_does_not_know(folder: Path) -> None:
    edit_config(folder, model_type="llamma")
    with pytest.raises(ValueError, match=f"^cannot load {folder}: .*llamma"):
        load(folder)


def test_a_config_of_another_size(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    message = rf"^{folder}: model.layers.0.mlp.down_proj.weight is \(16, 48\), expected \(16, 64\)$"
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is over 2,000, which no model has$"),
        ({"num_labels": 10**9}, "num_labels is over 100,000, which no model has$"),
        ({"vocab_size": 2**31}, r"of more than .* numbers, which its weight files cannot hold \("),
        ({"head_dim": 2**20}, r"of more than .* numbers, which its weight files cannot hold \("),
        ({"num_attention_heads": 2**24}, "Class validation .*: ValueError: The hidden size"),
        ({"vocab_size": -1}, "RuntimeError: "),
        ({"layer_types": ["full_attention"] * 1000}, r"must be equal to .* \(1000\)$"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_sizes_that_no_file_has(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("selector_of", float("nan")),
        ("activation_of", {"model.layers.0.mlp": 3}),
        ("shared_experts", "2"),
        ("expert_size", True),
        ("layouts", []),
        ("donor", None),
    ],
)
def test_a_block_with_values_of_another_kind(folder: Path, key: str, value: Any) -> None:
    edit_config(folder, moe_tools=THRESHOLD.to_dict() | {key: value})
    with pytest.raises(ValueError, match=f"^{key} in the moe_tools block of config.json is "):
        load(folder)


@pytest.mark.parametrize(
    "changes", [{"model_max_length": [1]}, {"tokenizer_class": 3}, {"added_tokens_decoder": 3}]
)
def test_settings_of_a_tokenizer_that_are_of_another_kind(
    folder: Path, changes: dict[str, Any]
) -> None:
    build_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=f"^{folder} has no tokenizer: "):
        load_tokenizer(folder)


# Where the tensors are wrong


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_file(folder: Path, kept: int) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"^{path} is truncated or no safetensors file: "):
        load(folder)


def test_a_truncated_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"^{path} is truncated or no safetensors file: "):
        load(sharded)


def test_a_missing_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[2]
    path.unlink()
    message = f"^{sharded} lacks {path.name}: the folder is incomplete$"
    with pytest.raises(ValueError, match=message):
        load(sharded)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_no_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"^{sharded / INDEX} is truncated or no index of shards"):
        load(sharded)


@pytest.mark.parametrize("outside", ["../donor/model.safetensors", "/etc/passwd", "x" * 999])
def test_an_index_that_names_files_elsewhere(sharded: Path, outside: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": outside}}))
    with pytest.raises(ValueError, match=f"^{sharded / INDEX} names '.*': a shard is in the fol"):
        load(sharded)


def test_one_file_goes_before_an_index_as_in_transformers(folder: Path) -> None:
    expected = logits(load(folder))
    (folder / INDEX).write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert torch.equal(logits(load(folder)), expected)


@pytest.mark.parametrize("removed", [ROUTER, ROUTER.replace("bias", "weight")])
def test_a_missing_router_is_never_a_random_one(folder: Path, removed: str) -> None:
    edit_tensors(folder / SINGLE, **{removed: None})
    with pytest.raises(ValueError, match=f"^{folder} lacks the router tensors {removed}$"):
        load(folder)


def test_many_missing_routers_are_counted(folder: Path) -> None:
    names = [name for name in stored_shapes(folder) if ".router." in name]
    edit_tensors(folder / SINGLE, **dict.fromkeys(names))
    with pytest.raises(ValueError, match=r"lacks the router tensors .*, .*, .* and 1 more$"):
        load(folder)


def test_a_router_lost_from_a_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit_tensors(sharded / index[ROUTER], **{ROUTER: None})
    with pytest.raises(ValueError, match=f"^{sharded} lacks the router tensors {ROUTER}$"):
        load(sharded)


def test_a_router_of_another_shape(folder: Path) -> None:
    edit_tensors(folder / SINGLE, **{ROUTER: torch.zeros(3)})
    with pytest.raises(ValueError, match=rf"^{folder}: {ROUTER} is \(3,\), expected \(6,\)$"):
        load(folder)


def test_a_missing_host_tensor(folder: Path) -> None:
    edit_tensors(folder / SINGLE, **{UP: None})
    with pytest.raises(ValueError, match=f"^{folder} lacks the tensors {UP}$"):
        load(folder)


def test_a_host_tensor_of_another_shape(folder: Path) -> None:
    edit_tensors(folder / SINGLE, **{UP: torch.zeros(40, 16)})
    message = rf"^{folder}: {UP} is \(40, 16\), expected \(48, 16\)$"
    with pytest.raises(ValueError, match=message):
        load(folder)


# Where the output goes


@pytest.mark.parametrize("occupy", ["file", "folder"])
def test_what_is_already_there_is_refused_and_untouched(occupy: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if occupy == "file":
        target.write_text("mine")
    else:
        (target / "sub").mkdir(parents=True)
        (target / "sub" / "thesis.txt").write_text("mine")
    before = files(tmp_path)
    message = f"^{target} exists and is not empty: choose another folder$"
    with pytest.raises(ValueError, match=message):
        save(convert(), target)
    assert files(tmp_path) == before


def test_a_saved_model_is_not_overwritten_either(folder: Path) -> None:
    before = files(folder)
    with pytest.raises(ValueError, match="exists and is not empty"):
        save(convert(), folder)
    assert files(folder) == before


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(convert(), tmp_path / "out")
    assert expert_ffns(load(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parents_are_made(tmp_path: Path) -> None:
    save(convert(), tmp_path / "a" / "b" / "out")
    assert expert_ffns(load(tmp_path / "a" / "b" / "out"))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after-writing"])
def test_a_failed_save_leaves_nothing(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PreTrainedModel.save_pretrained

    def fail(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if after:
            write(self, *args, **kwargs)
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save(convert(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_killed_save_is_no_obstacle(tmp_path: Path) -> None:
    """A process that dies cannot clean up: its folder is hidden, and replaced by the next."""
    killed = tmp_path / ".out.partial"
    killed.mkdir()
    (killed / "half.safetensors").write_text("")
    save(convert(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "half.safetensors").exists()


# Tokenizers and the hub


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def test_a_tokenizer_travels_with_its_model(tmp_path: Path) -> None:
    save(convert(), tmp_path / "out", make_tokenizer())
    assert load_tokenizer(tmp_path / "out")("hello big world")["input_ids"] == [1, 0, 2]


@pytest.mark.parametrize(
    "source",
    [lambda folder: folder, lambda folder: folder / "nothing", lambda folder: folder / "x.gguf"],
    ids=["without", "missing", "gguf"],
)
def test_a_source_without_a_tokenizer(folder: Path, source: Callable[[Path], Path]) -> None:
    with pytest.raises(ValueError, match=f"^{source(folder)} has no tokenizer: "):
        load_tokenizer(source(folder))


def test_the_routers_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    dense, model = load(folder, routed=False), load(folder)
    assert expert_ffns(dense) == [] and said(dense) == THRESHOLD.unrouted()
    with every_expert_on(model):
        torch.testing.assert_close(logits(dense), logits(model), atol=2e-5, rtol=1e-5)
    save(dense, tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense")), logits(dense))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the empty repository `someone/tiny`; its folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    return repository / "snapshots" / "abc"


def test_a_converted_model_loads_from_the_hub(folder: Path, hub: Path) -> None:
    shutil.copytree(folder, hub, dirs_exist_ok=True)
    loaded = load("someone/tiny")
    assert said(loaded) == THRESHOLD
    assert torch.equal(logits(loaded), logits(load(folder)))


def test_a_pickle_on_the_hub_is_no_model(hub: Path) -> None:
    donor = build("llama")
    donor.config.save_pretrained(hub)
    torch.save(donor.state_dict(), hub / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^cannot load someone/tiny: no such folder"):
        load("someone/tiny")
