"""The stock classes of transformers, on converted folders: routed, never silently another model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import moe_tools
from moe_tools.checkpoint import auto
from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts, read_conversion
from moe_tools.experts.experts import every_expert_on, expert_ffns
from moe_tools.experts.swapped import swap_activations
from moe_tools.names import SINGLE
from tests.checkpoint.test_loading import ROUTER, UP, convert, edit_tensors
from tests.families import (
    FAMILIES,
    THRESHOLD,
    aligned,
    build,
    load_stock,
    logits,
    stored_shapes,
)

HOST = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
"""All of a llama that is no layer."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(convert(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "bert", "t5-gated", "mixtral"])
def test_the_stock_class_gives_the_routed_model_and_saves_it_again(
    family: str, tmp_path: Path
) -> None:
    model = convert(family)
    save(model, tmp_path / "out")
    loaded, report = FAMILIES[family].model.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert read_conversion(loaded) == THRESHOLD
    assert torch.equal(logits(aligned(loaded)), logits(model))

    loaded.save_pretrained(tmp_path / "again")
    assert stored_shapes(tmp_path / "again") == stored_shapes(tmp_path / "out")
    assert torch.equal(logits(aligned(load(tmp_path / "again"))), logits(model))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_given_state_dict_is_saved_under_the_hosts_names(family: str, tmp_path: Path) -> None:
    model = convert(family)
    model.save_pretrained(tmp_path / "out", state_dict=model.state_dict())
    assert torch.equal(logits(aligned(load(tmp_path / "out"))), logits(model))


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "mixtral"])
def test_a_loaded_model_takes_the_tensors_of_a_folder(family: str, tmp_path: Path) -> None:
    """As Trainer does, to resume; and those that it has itself."""
    model, other = convert(family), convert(family)
    save(model, tmp_path / "out")
    save(other, tmp_path / "other")
    loaded = FAMILIES[family].model.from_pretrained(tmp_path / "other")
    own = {name: value.clone() for name, value in loaded.state_dict().items()}
    report = loaded.load_state_dict(load_file(tmp_path / "out" / SINGLE), strict=False)
    assert not report.unexpected_keys
    assert all("lm_head" in key or "decoder." in key for key in report.missing_keys)  # tied
    assert torch.equal(logits(aligned(loaded)), logits(model))
    loaded.load_state_dict(own)
    assert torch.equal(logits(aligned(loaded)), logits(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_of_the_host_alone_and_saved_without_loss(
    dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for ffn in expert_ffns(model):
        assert ffn.weights().up_FD.dtype == dtype
        assert {parameter.dtype for parameter in ffn.router.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "again", max_shard_size="4KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    saved = again.state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())


def test_the_model_without_a_head_is_routed_too(folder: Path) -> None:
    own = {"model.layers.1.mlp": {"kind": "topk", "k": 2}}
    config = AutoConfig.from_pretrained(folder)
    config.moe_tools["selector_of"] = own
    body = AutoModel.from_pretrained(folder, config=config)
    assert [ffn.name for ffn in expert_ffns(body)] == ["layers.0.mlp", "layers.1.mlp"]
    ids = torch.arange(9)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder, config=config).model(ids)
    assert torch.equal(body(ids).last_hidden_state, expected.last_hidden_state)
    assert not torch.equal(load(folder).model(ids).last_hidden_state, expected.last_hidden_state)


def test_a_classifier_gets_a_fresh_head_on_a_routed_body(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    routers = load_file(folder / SINGLE)
    for ffn in expert_ffns(model):
        for key, value in ffn.router.state_dict().items():
            assert torch.equal(value, routers[f"{ffn.name}.router.{key}"])
    assert len(expert_ffns(model)) == 2


@pytest.mark.parametrize("removed", [ROUTER, UP])
def test_what_the_folder_lacks_is_an_error_and_never_random(removed: str, folder: Path) -> None:
    edit_tensors(folder / SINGLE, **{removed: None})
    with pytest.raises(ValueError, match=f"^{folder} lacks the .*{removed}$"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_state_dict_in_place_of_a_folder(folder: Path) -> None:
    config, state = AutoConfig.from_pretrained(folder), load_file(folder / SINGLE)
    host = FAMILIES["llama"].model
    model = host.from_pretrained(None, config=config, state_dict=dict(state))
    assert torch.equal(logits(aligned(model)), logits(aligned(load(folder))))
    del state[ROUTER]
    with pytest.raises(ValueError, match=f"lacks the router tensors {ROUTER}$"):
        host.from_pretrained(None, config=config, state_dict=state)


ON_DISK = dict.fromkeys(HOST, "cpu") | {"model.layers.0": "cpu", "model.layers.1": "disk"}


@pytest.mark.parametrize("places", [{"": "cpu"}, ON_DISK], ids=["one", "with-disk"])
def test_a_device_map(places: dict[str, str], folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert (logits(model) - logits(load(folder))).abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("family", "router", "message"),
    [
        ("llama", "oracle", "router oracle reads the FFN's rows, which cannot stay on disk"),
        ("mixtral", "sigmoid", "experts: the experts of an MoE host cannot stay on disk"),
    ],
)
def test_what_cannot_stay_on_disk_is_refused(
    family: str, router: str, message: str, tmp_path: Path
) -> None:
    model = build(family)
    attach_experts(model, replace(THRESHOLD, router=router))
    save(model, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", device_map=ON_DISK, offload_folder=tmp_path / "offload"
        )


def test_an_activation_of_ours_loads_too(tmp_path: Path) -> None:
    model = build("llama")
    swap_activations(model, Conversion("donor", activation={"kind": "drelu"}))
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(aligned(loaded)), logits(model))
    random = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    with pytest.raises(ValueError, match="from the config of a converted one, without its folder"):
        logits(random)


def test_the_patch_is_one_and_goes_without_a_trace() -> None:
    patched = dict(vars(PreTrainedModel))
    moe_tools.patch_transformers()
    assert dict(vars(PreTrainedModel)) == patched
    with transformers_patched(False):
        plain = dict(vars(PreTrainedModel))
        changed = {name for name in plain if plain[name] is not patched[name]}
        assert changed == {"_load_pretrained_model", "save_pretrained"}
        with transformers_patched(True):
            assert PreTrainedModel.save_pretrained is not plain["save_pretrained"]
        assert dict(vars(PreTrainedModel)) == plain
        moe_tools.unpatch_transformers()  # a second time
        assert dict(vars(PreTrainedModel)) == plain
    assert PreTrainedModel.save_pretrained is not plain["save_pretrained"]


def test_without_the_patch_the_folder_is_dense(folder: Path) -> None:
    dense = load_stock(FAMILIES["llama"].model, folder)
    assert not expert_ffns(dense)
    with every_expert_on(model := load(folder)):
        torch.testing.assert_close(logits(dense), logits(model), atol=2e-6, rtol=0)


class Renamed:
    """A class of models that fills them elsewhere."""

    def save_pretrained(self) -> None:
        """As ever."""


@pytest.mark.parametrize("seam", [None, staticmethod(lambda model, files: None)])
def test_a_transformers_that_loads_otherwise_says_so(seam: Any) -> None:
    members = {} if seam is None else {"_load_pretrained_model": seam}
    modeling = SimpleNamespace(PreTrainedModel=type("PreTrainedModel", (Renamed,), members))
    with pytest.raises(ImportError, match=r"no longer loads weights in .*: install a transformers"):
        auto._patch(modeling)  # type: ignore[arg-type]


IN_ORDER = """
import sys
import moe_tools
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp).__name__ == "ExpertFFN"
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("moe_tools")]
"""
LATE = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
assert not [name for name in sys.modules if name.startswith("moe_tools")]
import moe_tools
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp).__name__ == "ExpertFFN"
moe_tools.unpatch_transformers()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [IN_ORDER, LATE], ids=["moe-tools first", "transformers first"])
def test_the_order_of_imports_does_not_matter(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
