"""The five examples of docs/extending.md, whole, in a package of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routers import ROUTERS
from moe_tools.experts.routing import record_routing
from moe_tools.export import TARGETS, export
from moe_tools.hosts.ffn import find_ffns
from moe_tools.hosts.shapes import LAYOUTS
from moe_tools.recipe import STEPS, read_recipe
from moe_tools.runs.run import run
from moe_tools.training.losses import LOSSES, Observed
from tests.docs.test_docs import ROOT, blocks
from tests.families import build, logits, model_inputs, randomize, routed
from tests.runs.test_run import work as work

NAMES = ("family", "router", "loss", "step", "form")
TABLES = (LAYOUTS, ROUTERS._things, LOSSES._things, STEPS._things, TARGETS._things)
RECIPE = """
name: extended
data: {text}
block_length: 16
steps:
  - prune: {{share: 0.25}}
  - split: {{expert_size: 8, method: random}}
  - attach: {{router: plain, selector: {{kind: topk, k: 2}}}}
  - train: {{mode: straight, tokens: 256, batch_size: 2, losses: {{lm: 1.0, balance: 0.1}}}}
"""


@pytest.fixture
def extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package with a module an example, imported; afterwards nothing is registered."""
    kept = [dict(table) for table in TABLES]
    package = tmp_path / "packages" / "extras"
    package.mkdir(parents=True)
    codes = [text for kind, text in blocks(ROOT / "docs" / "extending.md") if kind == "python"]
    for name, code in zip(NAMES, codes, strict=True):
        (package / f"{name}.py").write_text("from __future__ import annotations\n\n" + code)
    (package / "__init__.py").write_text(f"from extras import {', '.join(NAMES)}\n")
    monkeypatch.syspath_prepend(str(package.parent))
    yield import_module("extras")
    for table, before in zip(TABLES, kept, strict=True):
        table.clear()
        table.update(before)
    for name in [name for name in sys.modules if name.split(".")[0] == "extras"]:
        del sys.modules[name]


class ToyMLP(nn.Module):
    """A host's FFN that no row of ours knows."""

    def __init__(self, mlp: LlamaMLP) -> None:
        super().__init__()
        self.w_gate, self.w_in, self.w_out = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act = mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(self.act(self.w_gate(x)) * self.w_in(x))


def test_a_family_of_a_package_is_converted_exactly(extras: ModuleType) -> None:
    model = build("llama")
    assert isinstance(model, LlamaForCausalLM)
    for layer in model.model.layers:
        layer.mlp = ToyMLP(layer.mlp)
    assert torch.equal(logits(routed(model)[0]), logits(model))


def test_a_router_a_loss_and_a_step_of_a_package_are_words_of_a_recipe(
    extras: ModuleType, work: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(text=work / "text.txt"))
    out = run(
        read_recipe(recipe),
        str(work / "donor"),
        tmp_path / "out",
        dtype=torch.float32,
        stream=False,
    )
    model = load(out)
    assert {type(ffn.router).__name__ for ffn in expert_ffns(model)} == {"PlainRouter"}
    assert all(ffn.route(torch.randn(3, 16)).mask_TE.sum() == 6 for ffn in expert_ffns(model))
    assert '"balance"' in (out / "metrics.json").read_text()
    donor, dense = load(work / "donor"), load(out, routed=False)
    assert len(find_ffns(dense)) == len(find_ffns(donor)) == 2


def test_a_loss_of_a_package_is_its_formula(extras: ModuleType) -> None:
    model, _ = routed(build("llama"))
    randomize(model)
    with record_routing(model) as routings:
        model(**model_inputs(model))
    means = [routing.scores_TE.flatten(0, 1).mean(0) for routing in routings]
    expected = sum(((mean_E - mean_E.mean()) ** 2).mean() for mean_E in means) / len(means)
    compute = LOSSES["balance"].compute
    assert compute is not None
    torch.testing.assert_close(compute(Observed(routings)), expected)


def test_a_step_of_a_package_prunes(extras: ModuleType, work: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = f"data: {work / 'text.txt'}\nblock_length: 16"
    recipe.write_text(f"name: pruned\n{text}\nsteps: [prune: {{share: 0.25}}]")
    out = run(read_recipe(recipe), str(work / "donor"), tmp_path / "out", dtype=torch.float32)
    for ffn in find_ffns(load(out)):
        norm_F = ffn.weights().down_norm_F
        assert int((norm_F == 0).sum()) == len(norm_F) // 4
    with pytest.raises(ValueError, match=r"prune: share is 2\.0, but must be strictly between 0"):
        read_recipe(_written(tmp_path, "name: x\nsteps: [prune: {share: 2}]"))


def test_an_export_format_of_a_package_is_written(extras: ModuleType, tmp_path: Path) -> None:
    model = build("llama")
    save(model, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "down.npz", to="npz")
    written = numpy.load(tmp_path / "down.npz")
    for ffn in find_ffns(model):
        assert torch.equal(torch.from_numpy(written[ffn.name]), ffn.weights().down_FD)


def test_a_name_that_is_taken_is_refused(extras: ModuleType) -> None:
    with pytest.raises(
        ValueError, match=r"^there is a router 'plain' already: choose another name"
    ):
        ROUTERS.add("plain", ROUTERS["plain"])


def _written(folder: Path, text: str) -> Path:
    file = folder / "other.yaml"
    file.write_text(text)
    return file
