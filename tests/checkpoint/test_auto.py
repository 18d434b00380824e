"""The stock classes of transformers, on converted folders: routed, never silently another model."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

import moe_tools
from moe_tools.checkpoint import auto
from moe_tools.checkpoint import rebuild as rebuild_module
from moe_tools.checkpoint.auto import SUPPORTED, Patch, transformers_patched
from moe_tools.checkpoint.import_hook import AfterImport
from moe_tools.checkpoint.loading import load, load_classifier
from moe_tools.checkpoint.saving import save
from moe_tools.checkpoint.skeleton import skeleton
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
    routed,
    said,
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
    assert said(loaded) == THRESHOLD
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


PLACES = {"_load_pretrained_model", "save_pretrained", "post_init"}


def test_the_patch_is_one_and_goes_without_a_trace() -> None:
    patched, finders = dict(vars(PreTrainedModel)), list(sys.meta_path)
    moe_tools.patch_transformers()
    assert dict(vars(PreTrainedModel)) == patched
    try:
        moe_tools.unpatch_transformers()
        plain = dict(vars(PreTrainedModel))
        assert {name for name in plain if plain[name] is not patched[name]} == PLACES
        assert "__missing__" not in vars(type(ACT2FN))
        assert not any(isinstance(finder, AfterImport) for finder in sys.meta_path)
        with transformers_patched(True):
            assert PreTrainedModel.save_pretrained is not plain["save_pretrained"]
        assert dict(vars(PreTrainedModel)) == plain
        moe_tools.unpatch_transformers()  # a second time
        assert dict(vars(PreTrainedModel)) == plain
    finally:
        moe_tools.patch_transformers()
    assert PreTrainedModel.save_pretrained is not plain["save_pretrained"]
    assert set(sys.meta_path) == set(finders)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of a library that wraps the loading and the saving after us, and names no argument."""
    calls: list[str] = []

    def wrap(name: str) -> Any:
        inner = getattr(PreTrainedModel, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return inner(*args, **kwargs)

        return wrapper

    load = "_load_pretrained_model"
    monkeypatch.setattr(PreTrainedModel, load, staticmethod(wrap(load)))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", wrap("save_pretrained"))
    return calls


def rebuilds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every model that is rebuilt."""
    made: list[Any] = []

    def rebuild(model: Any, *args: Any) -> None:
        made.append(model)
        real(model, *args)

    real = rebuild_module.rebuild
    monkeypatch.setattr(rebuild_module, "rebuild", rebuild)
    return made


def test_a_library_that_wraps_later_keeps_its_wrapper(
    theirs: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = {name: vars(PreTrainedModel)[name] for name in PLACES - {"post_init"}}
    made = rebuilds(monkeypatch)
    moe_tools.unpatch_transformers()
    try:
        assert {name: vars(PreTrainedModel)[name] for name in wrapped} == wrapped
        assert not expert_ffns(AutoModelForCausalLM.from_pretrained(folder)) and not made
    finally:
        moe_tools.patch_transformers()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(expert_ffns(model)) == 2 and made == [model]
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(aligned(load(tmp_path / "again"))), logits(aligned(model)))
    assert set(theirs) == set(wrapped)
    moe_tools.unpatch_transformers()
    assert {name: vars(PreTrainedModel)[name] for name in wrapped} == wrapped
    moe_tools.patch_transformers()


def test_a_library_that_takes_our_place_is_an_error_and_can_be_wrapped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe_tools.unpatch_transformers()
    stock = PreTrainedModel._load_pretrained_model
    moe_tools.patch_transformers()
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(stock))
    with pytest.raises(ValueError, match=r"its dense host.*\(call moe_tools.patch_transformers"):
        load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="config of a converted model, but has no routers"):
        logits(model)
    moe_tools.patch_transformers()
    assert len(expert_ffns(load(folder))) == 2
    moe_tools.unpatch_transformers()
    monkeypatch.undo()
    moe_tools.patch_transformers()


def test_threads_do_not_switch_each_other_off(folder: Path) -> None:
    """One leaves `load` while another is in the middle of it, in a session without the patch."""
    inside, left = threading.Event(), threading.Event()
    found: list[int] = []

    def slow(module: Any, *_: Any) -> None:
        inside.set()
        assert left.wait(60)

    def work() -> None:
        with transformers_patched(True):
            slow(None)
            found.append(len(expert_ffns(AutoModelForCausalLM.from_pretrained(folder))))

    moe_tools.unpatch_transformers()
    try:
        thread = threading.Thread(target=work)
        with transformers_patched(True):
            thread.start()
            assert inside.wait(60)
        assert not expert_ffns(AutoModelForCausalLM.from_pretrained(folder))  # of this thread
        left.set()
        thread.join()
    finally:
        moe_tools.patch_transformers()
    assert found == [2]


def test_a_model_that_is_built_around_the_loading_refuses_to_run(folder: Path) -> None:
    """As `accelerate` does: a model from the config alone, then weights by their names."""
    config = AutoConfig.from_pretrained(folder)
    message = "was built from the config of a converted model, but has no routers: load its folder"
    for build_model in (AutoModelForCausalLM.from_config, AutoModel.from_config):
        model = build_model(config)
        model.load_state_dict(load_file(folder / SINGLE), strict=False)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                model(torch.arange(9)[None])
    conversion = read_conversion(model)
    assert conversion is not None
    attach_experts(model, conversion)
    model(torch.arange(9)[None])
    assert not any(module._forward_pre_hooks for module in model.modules())
    unrouted = AutoConfig.from_pretrained(folder)
    unrouted.moe_tools["router"] = None
    assert not AutoModelForCausalLM.from_config(unrouted)._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "t5-gated", "mixtral"])
def test_a_loaded_model_has_no_hook(family: str, tmp_path: Path) -> None:
    save(convert(family), tmp_path / "out")
    stock = FAMILIES[family].model.from_pretrained(tmp_path / "out")
    for model in (stock, load(tmp_path / "out"), skeleton(str(tmp_path / "out"))):
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_distributed_checkpoint_is_refused_by_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers has a second way to fill a model, which does not pass through ours."""
    monkeypatch.setattr(rebuild_module, "rebuild", lambda *_: None)
    with pytest.raises(ValueError, match="distributed checkpoint"):
        load(folder)
    with pytest.raises(ValueError, match="distributed checkpoint"):
        load_classifier(str(folder), ["a", "b"], dtype=torch.float32)


def test_without_the_patch_the_folder_is_dense(folder: Path) -> None:
    dense = load_stock(FAMILIES["llama"].model, folder)
    assert not expert_ffns(dense)
    with every_expert_on(model := load(folder)):
        torch.testing.assert_close(logits(dense), logits(model), atol=2e-6, rtol=0)


class Renamed:
    """A class of models that fills them elsewhere."""

    def save_pretrained(self) -> None:
        """As ever."""


def other_transformers(monkeypatch: pytest.MonkeyPatch, **members: Any) -> Patch:
    """A patch of a library whose class of models has these members, in force."""
    model = type("PreTrainedModel", (Renamed,), members)
    module = SimpleNamespace(PreTrainedModel=model, __name__="other_transformers")
    monkeypatch.setitem(sys.modules, "other_transformers", module)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return Patch("other_transformers")


@pytest.mark.parametrize(
    ("seam", "why"),
    [
        (None, "PreTrainedModel has no _load_pretrained_model"),
        (staticmethod(lambda model, files: None), "has no checkpoint_files and no load_config"),
    ],
)
def test_a_transformers_that_loads_otherwise_is_a_warning_and_refused_when_needed(
    seam: Any, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    patch = other_transformers(monkeypatch, **({"_load_pretrained_model": seam} if seam else {}))
    said = (
        rf"^transformers {re.escape(transformers.__version__)} does not load models in the way "
        rf"that moe-tools knows \(.*{why}.*\): "
        rf"install transformers{re.escape(SUPPORTED)}, or a newer"
    )
    patch.switch(True)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and re.match(said, record.getMessage())
    assert "\n" not in record.getMessage()
    for _ in range(2):
        with pytest.raises(ValueError, match=said), patch.here(True):
            raise AssertionError("unreachable")
    assert len(caplog.records) == 1
    patch.switch(False)


def test_load_refuses_a_transformers_that_loads_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "_patch", other_transformers(monkeypatch))
    message = "^transformers .* does not load models in the way that moe-tools knows"
    calls = [
        lambda: load(folder),
        lambda: load("no/such/folder"),
        lambda: skeleton(str(folder)),
        lambda: load_classifier(str(folder), ["a", "b"], dtype=torch.float32),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert len(caplog.records) == 1


def test_a_module_without_the_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = other_transformers(monkeypatch)
    monkeypatch.delattr(sys.modules["other_transformers"], "PreTrainedModel")
    patch.switch(True)  # it may be half executed
    with pytest.raises(ValueError, match="other_transformers has no PreTrainedModel"):
        patch.check()
    patch.switch(False)


def test_the_supported_versions_are_those_of_the_requirements() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"transformers{auto.SUPPORTED}"' in text


IN_ORDER = """
import sys
import moe_tools
assert not {"torch", "transformers"} & set(sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp).__name__ == "ExpertFFN"
moe_tools.unpatch_transformers()
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
LOOKED_FOR = """
import importlib.util, sys
import moe_tools
assert importlib.util.find_spec("transformers.modeling_utils") is not None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp).__name__ == "ExpertFFN"
import importlib, transformers.modeling_utils as modeling
importlib.reload(modeling)
assert modeling.PreTrainedModel.save_pretrained.__code__.co_filename.endswith("auto.py")
"""
INTERRUPTED = """
import sys
import moe_tools
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.conversion_mapping":  # in the middle of modeling_utils
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
try:
    import transformers.modeling_utils
except KeyboardInterrupt:
    sys.meta_path = [each for each in sys.meta_path if not isinstance(each, Interrupt)]
else:
    raise AssertionError("it was not interrupted")
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp).__name__ == "ExpertFFN"
"""
SCRIPTS = {"in-order": IN_ORDER, "late": LATE, "found": LOOKED_FOR, "interrupted": INTERRUPTED}


@pytest.mark.slow
@pytest.mark.parametrize("code", SCRIPTS.values(), ids=SCRIPTS)
def test_the_order_of_imports_does_not_matter(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


AGAIN = """
import sys
import moe_tools
if sys.argv[3] == "transformers-first":
    import transformers
for name in [name for name in sys.modules if name.split(".")[0] == "moe_tools"]:
    del sys.modules[name]
import moe_tools
from moe_tools.experts.experts import expert_ffns
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert len(expert_ffns(model)) == 2
model.save_pretrained(sys.argv[2])
assert len(expert_ffns(moe_tools.load(sys.argv[2]))) == 2
moe_tools.unpatch_transformers()
assert not expert_ffns(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["transformers-first", "moe-tools-first"])
def test_moe_tools_may_be_imported_again(order: str, tmp_path: Path) -> None:
    """As notebooks and coverage do: two patches would rebuild a model twice."""
    model, _ = routed(build("llama"))
    save(model, tmp_path / "model")
    command = [sys.executable, "-c", AGAIN, str(tmp_path / "model"), str(tmp_path / "copy"), order]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
