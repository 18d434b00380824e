"""Parts of a host: together they are the whole, and each is a model of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.parts import Gap, Part, layer_paths
from moe_tools.checkpoint.saving import save
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.ffn import find_ffns, host_state_dict
from tests.families import build, host_tensors, randomize, routed

LAYERS = {
    "llama": ("model.layers.0", "model.layers.1"),
    "gpt2": ("transformer.h.0", "transformer.h.1"),
    "opt": ("model.decoder.layers.0", "model.decoder.layers.1"),
    "t5-gated": ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
    "mixtral": ("model.layers.0", "model.layers.1"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_are_those_that_hold_ffns(name: str) -> None:
    assert layer_paths(build(name)) == LAYERS[name]


@pytest.mark.parametrize("name", LAYERS)
def test_parts_are_the_whole_together(name: str, tmp_path: Path) -> None:
    donor = build(name)
    donor.save_pretrained(tmp_path / "hub", max_shard_size="20KB")  # under the hub's names
    found = {}
    for layer in (None, *LAYERS[name]):
        part = load(tmp_path / "hub", part=Part(LAYERS[name], layer))
        own = host_state_dict(part)
        assert not found.keys() & own.keys()
        found |= own
    whole = host_tensors(donor)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_a_layer_comes_with_its_routers(tmp_path: Path) -> None:
    model, _ = routed(build("llama"))
    randomize(model)
    save(model, tmp_path / "routed")
    part = load(tmp_path / "routed", part=Part(LAYERS["llama"], "model.layers.1"))
    (ffn,) = expert_ffns(part)
    assert ffn.name == "model.layers.1.mlp"
    whole = host_state_dict(model)
    assert all(torch.equal(value, whole[key]) for key, value in host_state_dict(part).items())


def test_a_part_is_a_model_of_the_same_name_and_config(tmp_path: Path) -> None:
    donor = build("llama")
    save(donor, tmp_path / "donor")
    part = load(tmp_path / "donor", part=Part(LAYERS["llama"], "model.layers.1"))
    assert type(part).__name__ == "LlamaForCausalLM"
    assert part.config.to_dict() == load(tmp_path / "donor").config.to_dict()
    assert [ffn.name for ffn in find_ffns(part)] == ["model.layers.1.mlp"]
    x = torch.randn(2, 3, 16)
    gaps = [module for module in part.modules() if isinstance(module, Gap)]
    assert len(gaps) == 5  # embeddings, the other layer, norm, rotary embedding, head
    assert gaps[0](x, mask=None) is x


def test_an_empty_model_has_every_shape_and_no_number(tmp_path: Path) -> None:
    model, _ = routed(build("opt"))
    save(model, tmp_path / "routed")
    empty = load(tmp_path / "routed", device="meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    shapes = {key: tensor.shape for key, tensor in host_state_dict(empty).items()}
    assert shapes == {key: tensor.shape for key, tensor in host_state_dict(model).items()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_an_empty_model_is_refused_where_a_full_one_is(
    key: str, device: str, tmp_path: Path
) -> None:
    save(build("llama"), tmp_path / "donor")
    file = tmp_path / "donor" / "model.safetensors"
    state = load_file(file)
    save_file({name: t for name, t in state.items() if name != key}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks the tensors {key}"):
        load(tmp_path / "donor", device=device)
    save_file({**state, key: torch.ones(3, 5)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{key} is \(3, 5\)"):
        load(tmp_path / "donor", device=device)
