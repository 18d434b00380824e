"""Thresholds on inputs: what they drop, and that a folder with them is the model that was made."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_tools
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts, read_conversion
from moe_tools.experts.experts import every_expert_on, expert_ffns
from moe_tools.hosts.input_threshold import MOST, thresholds_in
from moe_tools.inference.optimized import optimize
from moe_tools.inference.packed_linear import ColumnLinear, PackedLinear
from moe_tools.measure.inputs import count_inputs
from moe_tools.recipe import Attach, Lora, Split, Swap, Threshold, Train
from moe_tools.steps.step import Work
from moe_tools.thresholds.calibration import Plan, thresholded
from moe_tools.thresholds.greedy_shares import greedy_shares
from moe_tools.thresholds.rows import input_sparsity, read_rows, set_input_sparsity
from moe_tools.training.checkpointing import NAME
from moe_tools.training.train import train
from tests.families import FUSED, MOE, TABLE, THRESHOLD, build, logits, model_inputs, of_size

NO_ATTENTION = ("nemotron_h",)
"""Their layers have an FFN or an attention, never both."""
WITH_EXPERTS = (*MOE, *FUSED)
property_test = settings(deadline=None, max_examples=60, derandomize=True, database=None)
every_family = pytest.mark.parametrize("family", TABLE)
HALF = Threshold(0.5)


def text(rows: int = 8, length: int = 32) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(7))


def given_to(step: Any, model: PreTrainedModel, folder: Path | None = None) -> dict[str, Any]:
    """What a step measures, with the text of these tests."""
    refuse: Any = pytest.fail
    return step.apply(model, Work(folder or Path(), "donor", 0, lambda _: text(), refuse, refuse))


def same(one: Tensor, other: Tensor, family: str) -> bool:
    """To the last bit; to 1e-5 where experts are views of one tensor, wherever that lies."""
    close = bool((one - other).abs().max() <= 1e-5)
    return close if family in WITH_EXPERTS else torch.equal(one, other)


def everywhere(family: str) -> Any:
    return "ffn" if family in NO_ATTENTION else "all"


def made(family: str = "llama", step: Threshold = HALF, **config: Any) -> PreTrainedModel:
    model = build(family, **config)
    given_to(step, model)
    return model


def counted(model: PreTrainedModel) -> float:
    """Share of what the weights read that goes unread on the calibration text."""
    with count_inputs(model) as counts, torch.no_grad():
        model(input_ids=text())
    return 1 - sum(one.read for one in counts) / sum(one.read_without for one in counts)


def chosen(when_off: Any = "zero") -> PreTrainedModel:
    """A routed llama, some of whose experts are off."""
    model = build("llama")
    attach_experts(model, replace(of_size(8), when_off=when_off))
    for ffn in expert_ffns(model):
        nn.init.normal_(ffn.router.weight, std=0.5)
    return model


@every_family
def test_a_threshold_of_0_changes_no_bit(family: str) -> None:
    model = build(family)
    before = logits(model)
    given_to(replace(HALF, target_sparsity=0.0, where=everywhere(family)), model)
    assert thresholds_in(model) and same(logits(model), before, family)


@every_family
def test_a_folder_is_the_model_that_was_made(family: str, tmp_path: Path) -> None:
    """Also streamed to another folder, by the Auto class, and as the dense model of its weights."""
    model = build(family)
    dense = logits(model)
    given_to(replace(HALF, where=everywhere(family), spend="greedy"), model)
    expected = logits(model)
    assert not torch.equal(expected, dense)
    save(model, tmp_path / "one")
    again = load(tmp_path / "one")
    assert same(logits(again), expected, family)
    assert read_conversion(again) == read_conversion(model)
    again.save_pretrained(tmp_path / "two")
    assert same(logits(load(tmp_path / "two")), expected, family)
    plain = load(tmp_path / "two", routed=False)
    assert not thresholds_in(plain) and same(logits(plain), dense, family)


@pytest.mark.parametrize("family", ["llama", "phi3", "bert", "mixtral", "gpt2"])
def test_the_share_is_reached_on_the_text(family: str) -> None:
    model = build(family)
    given_to(replace(HALF, target_sparsity=0.4, where="all"), model)
    rows = read_rows(read_conversion(model))
    assert input_sparsity(rows) == pytest.approx(0.4)
    assert all(row.share == pytest.approx(0.4) for row in rows.values())
    assert counted(model) == pytest.approx(0.4, abs=0.03)  # inputs move with those before them


def test_greedy_shares_have_the_mean_and_less_error() -> None:
    one, other = build("llama", num_hidden_layers=1), None
    other = copy.deepcopy(one)
    plain = copy.deepcopy(one)
    measured = given_to(replace(HALF, spend="greedy", where="all"), one)
    given_to(replace(HALF, where="all"), other)
    rows = read_rows(read_conversion(one))
    assert input_sparsity(rows) == pytest.approx(0.5)
    assert len({row.share for row in rows.values()}) > 1

    def error(model: PreTrainedModel) -> float:
        with torch.no_grad():
            found, right = (m.model(input_ids=text()[:4]) for m in (model, plain))
        return float((found[0] - right[0]).square().sum())

    assert measured["errors"].keys() == {"model.layers.0"}
    assert error(one) < error(other)


@property_test
@given(
    st.lists(
        st.tuples(st.floats(0.1, 10), st.floats(0, 10), st.floats(0.3, 5)), min_size=1, max_size=5
    ),
    st.floats(0, MOST),
)
def test_greedy_spends_exactly_and_is_never_worse_than_one_share(
    parts: list[tuple[float, float, float]], sparsity: float
) -> None:
    """Also where errors are not convex."""
    work = {str(index): part[0] for index, part in enumerate(parts)}

    def error(shares: Any) -> float:
        return sum(part[1] * shares[str(i)] ** part[2] for i, part in enumerate(parts))

    shares, found = greedy_shares(work, sparsity, error)
    spent = sum(shares[part] * work[part] for part in work)
    assert spent == pytest.approx(sparsity * sum(work.values()), abs=1e-6)
    assert all(0 <= share <= MOST + 1e-9 for share in shares.values())
    assert found <= error(dict.fromkeys(work, sparsity)) + 1e-12
    assert found == pytest.approx(error(shares), abs=1e-9)


def test_what_is_dropped_is_small_and_nothing_else_is() -> None:
    model = made()
    seen: list[Tensor] = []
    linear = model.model.layers[0].mlp.down_proj
    (row,) = [r for n, r in read_rows(read_conversion(model)).items() if n.endswith("0.mlp:hidden")]
    with every_expert_on(model):
        handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits(model)
    logits(model)
    handle.remove()
    whole, left = seen
    # layer 0's input is dropped, too, so h is another one: compare where it is 0 and how large
    assert (left == 0).any() and not (whole == 0).any()
    assert left[left != 0].abs().min() > row.at


@pytest.mark.parametrize("family", [name for name in TABLE if name not in WITH_EXPERTS])
def test_a_rotation_alone_is_the_dense_model(family: str, tmp_path: Path) -> None:
    model = build(family)
    before = logits(model)
    given_to(replace(HALF, target_sparsity=0.0, where="all", rotate=True), model)
    assert any(one.rotation is not None for one in thresholds_in(model).values())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)
    set_input_sparsity(model, 0.5)
    save(model, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), logits(model))


def test_a_rotation_makes_more_of_an_input_small() -> None:
    """Where numbers go together: here every neighbour is nearly the same."""
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 1::2] = model.model.embed_tokens.weight[:, ::2]
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1)
    errors = []
    for rotate in (False, True):
        one = copy.deepcopy(model)
        step = replace(HALF, where="all", sites="input", rotate=rotate, spend="greedy")
        errors.append(given_to(step, one)["errors"]["model.layers.0"])
    assert errors[1] < errors[0]
    for threshold in thresholds_in(one).values():
        assert threshold.rotation is not None
        gram = threshold.rotation @ threshold.rotation.T
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


def test_a_copy_a_pickle_and_a_cast_drop_the_same(tmp_path: Path) -> None:
    model = made(step=replace(HALF, where="all", rotate=True))
    expected = logits(model)
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for threshold in thresholds_in(model).values():
        threshold.at = 0.0  # a copy has thresholds of its own
    assert torch.equal(logits(copied), expected) and torch.equal(logits(loaded), expected)
    cast = logits(copied.to(torch.bfloat16)).float()
    assert (cast - expected).norm() < 0.3 * expected.norm()  # close numbers fall either way


def test_checkpointing_gives_the_same_gradients() -> None:
    model = made(step=replace(HALF, where="all", rotate=True)).train()
    found = []
    for on in (False, True):
        if on:
            getattr(model, f"{NAME}_enable")({"use_reentrant": False})
        model.zero_grad()
        model(**model_inputs(model)).logits.square().sum().backward()
        found.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    torch.testing.assert_close(found[0], found[1])
    assert found[0].abs().sum() > 0


def test_a_dropped_input_reads_no_weight() -> None:
    """Whatever stands in the columns of what every token drops makes no difference."""
    model = made(step=replace(HALF, sites="input"))
    up = model.model.layers[0].mlp.up_proj
    seen: list[Tensor] = []
    handle = up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    expected = logits(model)
    handle.remove()
    token = seen[0][0, 0]
    assert 0 < (token == 0).sum() < len(token)
    with torch.no_grad():
        up.weight[:, token == 0] = 7.0
    assert torch.equal(logits(model)[0, 0], expected[0, 0])


def test_h_of_a_routed_ffn_loses_what_is_small_of_what_was_chosen(tmp_path: Path) -> None:
    model = chosen()
    given_to(replace(HALF, target_sparsity=0.3, sites="hidden"), model)
    with count_inputs(model) as counts, torch.no_grad():
        model(input_ids=text())
    for one in counts:  # the router's zeros are in neither number
        assert 1 - one.read / one.read_without == pytest.approx(0.3, abs=0.03)
        assert one.read_without < one.tokens * one.width * one.reads_per_input
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(logits(again), logits(model))
    assert expert_ffns(again) and len(thresholds_in(again)) == 2


@pytest.mark.parametrize("family", TABLE)
def test_every_family_takes_a_threshold_inside_its_routed_ffns(family: str, tmp_path: Path) -> None:
    model = build(family)
    attach_experts(model, THRESHOLD)
    for ffn in expert_ffns(model):
        nn.init.normal_(ffn.router.weight, std=0.5)
    before = logits(model)
    given_to(replace(HALF, where=everywhere(family)), model)
    expected = logits(model)
    assert not same(expected, before, family)
    save(model, tmp_path / "model")
    assert same(logits(load(tmp_path / "model")), expected, family)


def test_after_import_the_auto_class_loads_it(tmp_path: Path) -> None:
    model = made(step=replace(HALF, where="all", rotate=True))
    save(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(loaded), logits(model))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["MoeToolsLlamaForCausalLM"]
    assert "inputs" in (tmp_path / "model" / "README.md").read_text()
    empty = AutoModelForCausalLM.from_config(loaded.config)
    with pytest.raises(ValueError, match="has no thresholds"):
        logits(empty)
    moe_tools.unpatch_transformers()
    try:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    finally:
        moe_tools.patch_transformers()
    assert not thresholds_in(stock)


@pytest.mark.parametrize("leaf", ["quantiles", "rotation"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(leaf: str, tmp_path: Path) -> None:
    save(made(step=replace(HALF, rotate=True)), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    whole = load_file(file)
    name = f"model.layers.1.mlp.gate_proj.threshold.{leaf}"
    save_file({**whole, name: whole[name][:3].clone()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} is \(3"):
        load(tmp_path / "model")
    save_file({key: one for key, one in whole.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks the threshold tensors {name}"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at": "much"}, "at of model.layers.0.mlp:hidden is 'much'"),
        ({"at": -1.0}, "out of range"),
        ({"more": 1}, "no threshold"),
        ({"linears": ["model.layers.0.nothing"]}, "no linear model.layers.0.nothing"),
    ],
)
def test_a_row_that_cannot_be_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    save(made(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["moe_tools"]["thresholds"]["model.layers.0.mlp:hidden"].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model")


def test_another_share_needs_no_text(tmp_path: Path) -> None:
    model = made(step=replace(HALF, where="all", spend="greedy"))
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    before = {n: r.share for n, r in read_rows(read_conversion(again)).items()}
    for share in (0.2, 0.8, 0.5):
        set_input_sparsity(again, share)
        rows = read_rows(read_conversion(again))
        assert input_sparsity(rows) == pytest.approx(share)
        assert counted(again) == pytest.approx(share, abs=0.06)
    assert {n: r.share for n, r in rows.items()} != before  # the way back is another one
    set_input_sparsity(again, 0.5, start=read_rows(read_conversion(model)))
    moved = {n: r.share for n, r in read_rows(read_conversion(again)).items()}
    assert moved == pytest.approx(before)
    with pytest.raises(ValueError, match="sparsity is 1"):
        set_input_sparsity(again, 1.0)
    with pytest.raises(ValueError, match="no thresholds to set"):
        set_input_sparsity(build("llama"), 0.5)


def test_with_every_expert_on_nothing_is_dropped() -> None:
    model = build("llama")
    before = logits(model)
    given_to(replace(HALF, where="all"), model)
    with every_expert_on(model):
        assert torch.equal(logits(model), before)
    assert not torch.equal(logits(model), before)


def test_for_a_while_a_model_drops_its_inputs() -> None:
    model = build("llama")
    before, names = logits(model), set(model.state_dict())
    plans = Plan(0.5, "all", spend="greedy"), Plan(0.5, "all")
    found = []
    for plan in plans:
        with thresholded(model, plan, text()) as calibrated:
            assert input_sparsity(calibrated.rows) == pytest.approx(0.5)
            found.append(logits(model))
        assert torch.equal(logits(model), before) and set(model.state_dict()) == names
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], before)


def test_adapters_see_what_the_thresholds_leave(tmp_path: Path) -> None:
    """So that merging changes no output, and the thresholds are where they were."""
    model = made(step=replace(HALF, where="all"))
    kept = set(model.state_dict())
    seen: list[Tensor] = []

    def watch(self: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    before = LoraModel.__init__

    def init(self: LoraModel, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        for name, module in self.model.named_modules():
            if "lora_A.default" in name:
                module.register_forward_pre_hook(watch)

    step = Train(16, batch_size=2, lora=Lora(rank=2), losses={"lm": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraModel, "__init__", init)
        train(model, step, moe_text(), tmp_path)
    assert seen and all((x == 0).float().mean() > 0.2 for x in seen)
    assert set(model.state_dict()) == kept and len(thresholds_in(model)) == 8
    assert LoraConfig  # PEFT is there


@pytest.mark.parametrize(
    "step", [Swap({"kind": "relu"}), Split(8, method="random"), Attach("sigmoid", start="open")]
)
def test_what_changes_the_ffns_comes_before(step: Any) -> None:
    model = build("llama")
    given_to(Split(8, method="random"), model)
    given_to(HALF, model)
    before = logits(model)
    for do in (lambda: step.rehearse(model, "donor"), lambda: given_to(step, model)):
        with pytest.raises(ValueError, match="put `threshold` after"):
            do()
    assert torch.equal(logits(model), before)


def test_a_second_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="have thresholds"):
        given_to(HALF, made())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_rehearsal_refuses_what_can_be_known(device: str, tmp_path: Path) -> None:
    for family, step, message in (
        ("mixtral", replace(HALF, rotate=True), "as large as the expert: use rotate: false"),
        ("nemotron_h", replace(HALF, where="all"), "no attention .* use where: ffn"),
    ):
        save(build(family), tmp_path / family)
        model = load(tmp_path / family, device=device)
        with pytest.raises(ValueError, match=message):
            step.rehearse(model, "donor")
    model = chosen("mean")
    with pytest.raises(ValueError, match=r"when_off: mean.*use sites: input"):
        HALF.rehearse(model, "donor")
    replace(HALF, sites="input").rehearse(model, "donor")
    assert len(thresholds_in(model)) == 2


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"target_sparsity is .*must be in \[0, 0.99\]"):
        Threshold(sparsity).check()
    with pytest.raises(ValueError, match="rotate"):
        Threshold(0.5, rotate=True, sites="hidden").check()


@pytest.mark.parametrize("where", ["ffn", "all"])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_linears_keep_their_thresholds_on_packed_columns(where: Any, act: str) -> None:
    model = made(step=replace(HALF, where=where), hidden_act=act)
    dropped, expected = thresholds_in(model).keys(), logits(model)
    fast = optimize(copy.deepcopy(model))
    assert dropped and thresholds_in(fast).keys() == dropped
    layer = fast.model.layers[0]
    assert type(layer.mlp.up_proj) is ColumnLinear
    assert type(layer.self_attn.q_proj) is (ColumnLinear if where == "all" else PackedLinear)
    torch.testing.assert_close(logits(fast), expected, atol=2e-5, rtol=1e-5)
    ids = text(2, 6)
    made_ids = [one.generate(ids, max_new_tokens=9, do_sample=False) for one in (model, fast)]
    assert torch.equal(*made_ids)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fast.state_dict()[name], tensor)


def test_columns_survive_a_copy_a_pickle_and_a_cast() -> None:
    fast = optimize(made(step=replace(HALF, where="all")))
    expected = logits(fast)
    again = pickle.loads(pickle.dumps(fast))
    for one in (again, copy.deepcopy(fast)):
        assert type(one.model.layers[0].mlp.up_proj) is ColumnLinear
        assert torch.equal(logits(one), expected)
    with torch.no_grad():  # one by one, as a new token is computed
        one, cast = (each.model.layers[0].mlp for each in (fast, again.bfloat16()))
        x_TD = torch.randn(1, one.up_proj.in_features)
        torch.testing.assert_close(cast(x_TD.bfloat16()).float(), one(x_TD), atol=3e-2, rtol=3e-2)


def test_what_is_turned_back_has_no_zeros_to_skip() -> None:
    fast = optimize(made(step=replace(HALF, where="all", rotate=True)))
    assert type(fast.model.layers[0].self_attn.q_proj) is PackedLinear


def test_no_kernel_takes_an_ffn_with_thresholds() -> None:
    routed = chosen()
    given_to(replace(HALF, sites="hidden"), routed)
    with pytest.raises(
        ValueError, match="inputs have thresholds, which kernels of experts do not know"
    ):
        optimize(routed)


def test_linears_with_thresholds_are_not_quantized() -> None:
    model = chosen()
    rows = {"where": "all", "sites": "input"}
    given_to(replace(HALF, **rows), model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="thresholds"):
        optimize(model, linears="int8")


def test_an_unseen_expert_is_named() -> None:
    model = build("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # of equals, the first two are chosen
    with pytest.raises(ValueError, match="saw no calibration token"):
        given_to(HALF, model)
    assert not thresholds_in(model)  # and the model is as before


def moe_text() -> Any:
    from tests.training.test_train import text as training_text

    return training_text(16)


def test_a_conversion_of_an_earlier_format_has_none() -> None:
    block = Conversion("donor").to_dict() | {"format": 1}
    del block["thresholds"]
    assert read_rows(Conversion.from_dict(block)) == {}
