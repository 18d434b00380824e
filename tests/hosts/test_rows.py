"""Where a model's FFNs are, as its config keeps it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel

from moe_tools.experts.conversion import attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.ffn import find_ffns
from moe_tools.hosts.layouts import Layout
from moe_tools.hosts.proof import settle
from moe_tools.hosts.rows import read_rows, rows_of, write_rows
from tests.families import FAMILIES, THRESHOLD, build, force_on, model_inputs

ROW = Layout("up_proj", "down_proj", "act_fn", gate="gate_proj")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_read_as_they_were_written(family: str) -> None:
    model = build(family)
    rows = rows_of(model)
    assert read_rows(model, write_rows(model, rows)) == rows


def test_a_class_of_two_layouts_is_written_by_paths() -> None:
    model = build("llama")
    rows = {"model.layers.0.mlp": ROW, "model.layers.1.mlp": ROW.as_masked()}
    written = write_rows(model, rows)
    assert set(written) == set(rows)
    assert read_rows(model, written) == rows


def test_modules_of_the_class_that_are_no_holders_stay_dense() -> None:
    model = build("llama")
    rows = {"model.layers.0.mlp": ROW}
    assert write_rows(model, rows) == {"model.layers.0.mlp": ROW.to_dict()}


@pytest.mark.parametrize("row", [{}, {"up": "a"}, {"up": "a", "down": "b", "middle": "c"}, 3])
def test_what_is_no_layout_is_refused(row: object) -> None:
    with pytest.raises(ValueError, match="no layout of an FFN"):
        read_rows(build("llama"), {"LlamaMLP": row})


def bart(**config: float) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "max_position_embeddings": 32}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 48}
    return BartForConditionalGeneration(BartConfig(**sizes, **config))


@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_dropout_that_the_layer_calls_is_ours_in_training(hidden: float) -> None:
    donor = bart(activation_dropout=hidden, dropout=0.2).train()
    model = copy.deepcopy(donor)
    attach_experts(model, THRESHOLD)
    force_on(model)
    inputs = model_inputs(donor)
    outputs = []
    for each in (donor, model):
        torch.manual_seed(1)
        outputs.append(each(**inputs).logits)
    assert torch.equal(*outputs)
    torch.manual_seed(2)
    assert not torch.equal(model(**inputs).logits, outputs[0])


def test_tied_modules_are_one_ffn_with_one_router() -> None:
    model = build("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(second, name).weight = getattr(first, name).weight
        getattr(second, name).bias = getattr(first, name).bias
    (ffn,) = find_ffns(model)
    assert (ffn.name, ffn.also) == ("model.layers.0.mlp", ("model.layers.1.mlp",))
    (made,) = attach_experts(model, THRESHOLD)
    assert all(layer.mlp is made for layer in model.model.layers)
    assert len(expert_ffns(model)) == 1


def test_a_model_without_ffns_says_so() -> None:
    with pytest.raises(ValueError, match=r"^Sequential has no FFN that moe-tools can find: two"):
        find_ffns(nn.Sequential(nn.Linear(4, 4)))


def test_an_ffn_that_is_named_otherwise_is_found_in_the_graph() -> None:
    model = build("llama")
    names = {"gate_proj": "v", "up_proj": "w", "down_proj": "o"}

    class Odd(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            for old, new in names.items():
                self.add_module(new, mlp.get_submodule(old))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o(nn.functional.silu(self.v(x)) * self.w(x))

    model.model.layers[1].mlp = Odd(model.model.layers[1].mlp).eval()
    settle(model)
    row = rows_of(model)["model.layers.1.mlp"]
    assert (row.gate, row.up, row.down, row.act, row.function) == ("v", "w", "o", None, "silu")
