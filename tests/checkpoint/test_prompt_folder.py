"""A folder whose prompts select: the donor's weights, and a share in its config."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moe_tools
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.rebuild import check_rebuilt
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, read_conversion
from moe_tools.inference.prompt import select_by_prompt
from moe_tools.inference.prompt_ffn import prompt_ffns
from moe_tools.steps.select import select
from tests.families import TABLE, THRESHOLD, build, load_stock, logits, routed, stored_shapes

CAUSAL = [name for name in TABLE if name not in ("bert", "roberta", "t5-relu", "t5-gated")]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


def generated(model: PreTrainedModel) -> Tensor:
    """The logits of what a model generates."""
    host: Any = model
    ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(4))
    options = {"return_dict_in_generate": True, "output_logits": True}
    return torch.cat(host.generate(input_ids=ids, **GREEDY, **options).logits)


def same(one: Tensor, other: Tensor) -> bool:
    """But for the order of sums: loaded weights lie wherever they start in the file."""
    return bool((one - other).abs().max() <= 1e-5)


def written(family: str, folder: Path) -> PreTrainedModel:
    """Writes the folder of a random model, which is returned as it was."""
    torch.manual_seed(0)
    model = build(family)
    selecting = copy.deepcopy(model)
    select(selecting, 0.25, "donor")
    save(selecting, folder)
    return model


@pytest.mark.parametrize("family", CAUSAL)
def test_a_folder_generates_as_its_donor_selects(family: str, tmp_path: Path) -> None:
    """With moe-tools and through transformers; saved again, it is the same folder."""
    donor = written(family, tmp_path / "out")
    save(donor, tmp_path / "donor")
    plain = load(tmp_path / "donor")
    with select_by_prompt(plain, 0.25):
        expected = generated(plain)
    loaded = load(tmp_path / "out")
    assert [ffn.share for ffn in prompt_ffns(loaded)] == [0.25] * len(prompt_ffns(loaded)) != []
    assert same(generated(loaded), expected)
    assert (expected - generated(plain)).abs().max() > 1e-3
    assert same(generated(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
    save(loaded, tmp_path / "again")
    loaded.save_pretrained(tmp_path / "plainly")
    for folder in ("again", "plainly"):
        assert same(generated(load(tmp_path / folder)), expected)
        assert read_conversion(load(tmp_path / folder)) == read_conversion(loaded)
        assert stored_shapes(tmp_path / folder) == stored_shapes(tmp_path / "donor")


@pytest.mark.parametrize("family", CAUSAL)
def test_unrouted_or_without_moe_tools_it_is_the_donor(family: str, tmp_path: Path) -> None:
    donor = written(family, tmp_path / "out")
    save(donor, tmp_path / "donor")
    dense = load(tmp_path / "donor")
    for model in (
        load(tmp_path / "out", routed=False),
        load_stock(TABLE[family].model, tmp_path / "out"),
    ):
        assert not prompt_ffns(model)
        assert same(generated(model), generated(dense))
    assert read_conversion(load(tmp_path / "out", routed=False)).prompt_share is None  # type: ignore[union-attr]
    # a whole text is a prompt
    assert (logits(load(tmp_path / "out")) - logits(dense)).abs().max() <= 2e-6


def test_other_programs_find_the_class_of_the_donor(tmp_path: Path) -> None:
    written("llama", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["moe_tools"]["prompt_share"] == 0.25


def test_the_card_says_what_runs(tmp_path: Path) -> None:
    written("llama", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "every neuron runs on the prompt, and after it the 25% that mattered there" in card
    assert "**Without `import moe_tools` the same folder is the dense model**" in card


def test_a_model_made_of_the_config_alone_refuses_to_run(tmp_path: Path) -> None:
    written("llama", tmp_path / "out")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    with pytest.raises(ValueError, match="but has no selection by the prompt: load its folder"):
        logits(model)
    with pytest.raises(ValueError, match="but transformers loaded its dense host"):
        check_rebuilt(model, "out")


def test_a_body_without_a_head_selects_too(tmp_path: Path) -> None:
    from transformers import AutoModel

    written("llama", tmp_path / "out")
    assert len(prompt_ffns(AutoModel.from_pretrained(tmp_path / "out"))) == 2


def test_a_folder_of_another_activation_selects_too(tmp_path: Path) -> None:
    from moe_tools.experts.swapped import swap_activations

    model = build("llama")
    swap_activations(model, Conversion("donor", activation={"kind": "drelu"}))
    with select_by_prompt(model, 0.25):
        expected = generated(model)
    select(model, 0.25, "donor")
    save(model, tmp_path / "out")
    assert same(generated(load(tmp_path / "out")), expected)


def test_quantised_while_it_loads_it_selects_too(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    donor = build("llama", hidden_size=64, intermediate_size=128)
    save(donor, tmp_path / "donor")
    select(donor, 0.25, "donor")
    save(donor, tmp_path / "out")
    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    plain, loaded = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path / name, quantization_config=config, dtype=torch.float32
        )
        for name in ("donor", "out")
    )
    with select_by_prompt(plain, 0.25):
        expected = generated(plain)
    assert same(generated(loaded), expected)


def test_what_stays_on_disk_cannot_be_copied(tmp_path: Path) -> None:
    written("llama", tmp_path / "out")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="none of which can stay on disk"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", device_map=places, offload_folder=tmp_path / "off"
        )


@pytest.mark.parametrize("share", [0, 1.5, "half", True])
def test_a_share_that_is_none_is_refused(share: Any, tmp_path: Path) -> None:
    written("llama", tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["moe_tools"]["prompt_share"] = share
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="prompt_share") as error:
        load(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_routers_and_prompts_do_not_both_select() -> None:
    model, _ = routed(build("llama"))
    with pytest.raises(ValueError, match="is routed, which selects neurons for every token"):
        select(model, 0.5, "donor")
    with pytest.raises(ValueError, match="router sigmoid and prompt_share both select"):
        Conversion(**vars(THRESHOLD) | {"prompt_share": 0.5})


def test_it_is_evaluated_and_optimised_as_its_dense_model_alone(tmp_path: Path) -> None:
    written("llama", tmp_path / "out")
    model, blocks_BT = load(tmp_path / "out"), torch.randint(3, 64, (2, 9))
    for use in (moe_tools.optimize, lambda model: moe_tools.evaluate(model, blocks_BT)):
        with pytest.raises(ValueError, match="selecting its neurons by the prompt already"):
            use(model)
    dense = moe_tools.evaluate(load(tmp_path / "out", routed=False), blocks_BT)
    assert dense.ffn_sparsity == 0
