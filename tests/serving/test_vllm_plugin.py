"""The plugin as vLLM sees it, with a vLLM that only takes notes."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import LlamaConfig

from moe_tools.experts.conversion import Conversion
from moe_tools.serving.vllm_plugin import MODEL, name_ours, register
from tests.families import SPLIT, THRESHOLD

ROOT = Path(__file__).parents[2]
OURS = ["MoeToolsLlamaForCausalLM"]


class StockParser:
    """What vLLM reads configs with."""

    def parse(self, config: Any) -> tuple[dict[str, Any], Any]:
        return {"given": True}, config


class Notes:
    """What was registered."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}
        self.parser: Any = StockParser
        self.parsers = 0

    def register_model(self, name: str, model: str) -> None:
        self.models[name] = model

    def register_config_parser(self, kind: str) -> Any:
        def put(parser: Any) -> None:
            self.parser, self.parsers = parser, self.parsers + 1

        assert kind == "hf"
        return put


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Notes:
    """A vLLM of a few names, in the place of the real one."""
    notes = Notes()
    names = ("vllm", "vllm.transformers_utils", "vllm.transformers_utils.config")
    modules = {name: ModuleType(name) for name in names}
    vars(modules["vllm"])["ModelRegistry"] = notes
    vars(modules[names[-1]]).update(
        register_config_parser=notes.register_config_parser,
        get_config_parser=lambda kind: notes.parser(),
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return notes


def config(conversion: Conversion | None, names: list[str] | None) -> LlamaConfig:
    made = LlamaConfig(architectures=names)
    if conversion is not None:
        made.moe_tools = conversion.to_dict()
    return made


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["vllm.general_plugins"]["moe_tools"]
    module, _, name = value.partition(":")
    assert getattr(import_module(module), name) is register


def test_the_model_is_where_vllm_is_told() -> None:
    module, _, name = MODEL.partition(":")
    source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()
    assert f"class {name}(" in source  # importing it takes vLLM


def test_the_plugin_imports_light() -> None:
    code = "import moe_tools.serving.vllm_plugin, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "vllm"} & set(done.stdout.split())


def test_every_causal_model_gets_our_class_by_our_name(vllm: Notes) -> None:
    register()
    assert set(vllm.models.values()) == {MODEL}
    assert {"MoeToolsForCausalLM", "MoeToolsQwen3ForCausalLM", *OURS} <= set(vllm.models)
    assert all(name.startswith("MoeTools") for name in vllm.models)


def test_registering_twice_wraps_once(vllm: Notes) -> None:
    register()
    register()
    assert vllm.parsers == 1


def test_what_vllm_reads_of_a_converted_folder_has_our_name(vllm: Notes) -> None:
    register()
    given, read = vllm.parser().parse(config(THRESHOLD, ["LlamaForCausalLM"]))
    assert given == {"given": True}
    assert read.architectures == OURS


@pytest.mark.parametrize("names", [["LlamaForCausalLM"], OURS])
def test_both_names_become_ours(names: list[str]) -> None:
    read = config(THRESHOLD, names)
    name_ours(read)
    assert read.architectures == OURS


def test_selection_by_the_prompt_gets_our_name_to_be_refused() -> None:
    read = config(Conversion("donor", prompt_share=0.5), ["LlamaForCausalLM"])
    name_ours(read)
    assert read.architectures == OURS


@pytest.mark.parametrize("conversion", [None, SPLIT])
def test_what_the_stock_class_computes_stays_with_it(conversion: Conversion | None) -> None:
    read = config(conversion, ["LlamaForCausalLM"])
    name_ours(read)
    assert read.architectures == ["LlamaForCausalLM"]


def test_a_converted_config_without_a_name_gets_one() -> None:
    read = config(THRESHOLD, None)
    name_ours(read)
    assert read.architectures == ["MoeToolsForCausalLM"]
