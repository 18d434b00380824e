"""Optimised models: the same logits, texts and folders as before, in the same memory."""

from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Words
from tokenizers import models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import moe_tools
from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.experts.conversion import Conversion, attach_experts, set_mode
from moe_tools.experts.experts import every_expert_on, expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.experts.swapped import swap_activations
from moe_tools.hosts.ffn import find_ffns, grafted_ffns, host_state_dict
from moe_tools.inference import optimized
from moe_tools.inference.optimized import optimize
from moe_tools.inference.packed_linear import PackedLinear
from moe_tools.kernels.sparse_ffn import native_cpu
from tests.families import (
    EXPERT_SIZE,
    FAMILIES,
    THRESHOLD,
    UNEVEN,
    build,
    logits,
    of_size,
    randomize,
    routed,
)

EXACT = [{"kind": "relu"}, {"kind": "relu2"}, {"kind": "fatrelu", "theta": 0.05}, {"kind": "drelu"}]
NATIVE = "CpuFFN"


def make(family: str, size: int = UNEVEN, **config: Any) -> PreTrainedModel:
    """A routed model, another half of the experts off for every token."""
    model, _ = routed(build(family, **config), of_size(size))
    randomize(model)
    return model


def make_dense(family: str, spec: dict[str, Any]) -> PreTrainedModel:
    """A dense model with another activation."""
    model = build(family)
    swap_activations(model, Conversion("donor", activation=spec))
    return model


def optimised(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """A copy that is optimised; the model stays."""
    return optimize(copy.deepcopy(model), **options)


def packed_kinds(model: nn.Module) -> set[str]:
    return {type(ffn.packed).__name__ for ffn in grafted_ffns(model)}  # type: ignore[attr-defined]


def tokenizer() -> PreTrainedTokenizerFast:
    """Two words."""
    words = models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    made = Words(words)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="b")


def padded_batch() -> dict[str, Tensor]:
    """Three rows of one to seven tokens, padded on the left."""
    ids = torch.randint(3, 64, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :6] = 0
    return {"input_ids": ids, "attention_mask": mask}


def continued(model: PreTrainedModel, **options: Any) -> list[list[int]]:
    torch.manual_seed(3)
    host: Any = model
    ids = host.generate(
        **padded_batch(), max_new_tokens=8, min_new_tokens=8, do_sample=False, **options
    )
    return ids.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_stay(family: str) -> None:
    model = make(family)
    fast = optimised(model)
    assert packed_kinds(fast) == {NATIVE}
    torch.testing.assert_close(logits(fast), logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "mixtral"])
def test_greedy_texts_of_a_padded_batch_stay(family: str) -> None:
    model = make(family, pad_token_id=0, eos_token_id=2)
    fast = optimised(model)
    assert continued(fast, use_cache=True) == continued(model, use_cache=True)
    assert continued(fast, use_cache=False) == continued(model, use_cache=True)


@pytest.mark.parametrize("spec", EXACT, ids=lambda spec: spec["kind"])
@pytest.mark.parametrize("family", ["llama", "phi3", "t5-gated", "mixtral"])
def test_a_dense_model_with_exact_zeros_is_optimised_too(family: str, spec: dict[str, Any]) -> None:
    model = make_dense(family, spec)
    fast = optimised(model)
    assert packed_kinds(fast) == {NATIVE} and expert_ffns(fast) == []
    torch.testing.assert_close(logits(fast), logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["opt", "gpt2", "bert", "t5-relu"])
def test_so_is_one_without_a_gate(family: str) -> None:
    model = make_dense(family, {"kind": "relu"})
    fast = optimised(model)
    assert packed_kinds(fast) == {NATIVE}
    torch.testing.assert_close(logits(fast), logits(model), atol=2e-5, rtol=1e-5)


def test_experts_that_are_off_are_not_computed() -> None:
    model = make("llama", size=EXPERT_SIZE)
    fast = optimised(model)
    before = logits(fast)
    for ffn in expert_ffns(fast):
        ffn.packed.weights.down_FD[:EXPERT_SIZE] = torch.inf  # type: ignore[union-attr]
        ffn.router.bias.data[0] = -100.0  # the first expert is off for every token
    assert not torch.equal(logits(fast), before)
    x_1D = torch.randn(1, 16)
    assert all(ffn(x_1D).isfinite().all() for ffn in expert_ffns(fast))


def test_routing_is_recorded_as_before_and_every_expert_can_be_on() -> None:
    model = make("llama")
    fast = optimised(model)
    with record_routing(model) as slow_records:
        logits(model)
    with record_routing(fast) as fast_records:
        logits(fast)
    for slow, quick in zip(slow_records, fast_records, strict=True):
        assert torch.equal(slow.mask_TE, quick.mask_TE)
    with every_expert_on(model), every_expert_on(fast):
        torch.testing.assert_close(logits(fast), logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "bert", "mixtral"])
def test_a_folder_is_what_it_was_bit_by_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save(make(family), tmp_path / "made")
    save(load(tmp_path / "made", dtype=dtype), tmp_path / "before")
    save(load(tmp_path / "before", optimize=True), tmp_path / "after")
    names = sorted(file.name for file in (tmp_path / "before").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_so_is_that_of_a_dense_model(family: str, tmp_path: Path) -> None:
    spec = {"kind": "fatrelu", "theta": 0.1}
    save(make_dense(family, spec), tmp_path / "before")
    save(load(tmp_path / "before", optimize=True), tmp_path / "after")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_state_dict_is_what_it_was() -> None:
    model = make("phi3")
    before, after = model.state_dict(), optimised(model).state_dict()
    assert list(before) == list(after)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype


def test_wider_packing_loses_nothing(tmp_path: Path) -> None:
    model = make("llama").bfloat16()
    fast = optimised(model, dtype=torch.float32)
    torch.testing.assert_close(logits(fast), logits(model), atol=0.1, rtol=0.05)
    assert host_state_dict(fast).keys() == host_state_dict(model).keys()
    for key, tensor in host_state_dict(model).items():
        assert torch.equal(host_state_dict(fast)[key], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.int4])
def test_a_model_that_lost_digits_is_close_and_not_saved(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make("llama")
    fast = optimised(model, dtype=dtype)
    expected = logits(model)
    error = (logits(fast) - expected).norm() / expected.norm()
    assert 0 < error < (0.3 if dtype == torch.int4 else 0.05)
    with pytest.raises(ValueError, match=f"packed as {dtype}, which lost digits: save the model"):
        save(fast, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class LiveBytes:
    """Of a model and of every CPU tensor that was made since, storages counted once.

    What is there at the start is frozen: what other tests left behind may go at any time.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.before = [weakref.ref(t) for t in (*model.parameters(), *model.buffers())]

    def __enter__(self) -> LiveBytes:
        gc.collect()
        gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()

    def __call__(self) -> int:
        gc.collect()
        tensors = [*self._tensors(), *(t for ref in self.before if (t := ref()) is not None)]
        storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def _tensors(self) -> list[Tensor]:
        return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral"])
def test_memory_stays_within_a_layer_above_the_model(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = {"n_layer": 6} if family == "gpt2" else {"num_hidden_layers": 6}
    model = make(family, **depth)
    layer = sum(m.numel() for ffn in expert_ffns(model) for m in ffn.weights().matrices()) * 4 // 6
    pack, seen = optimized.pack, []
    with LiveBytes(model) as live_bytes:

        def watched(*args: Any, **options: Any) -> Any:
            made = pack(*args, **options)
            seen.append(live_bytes())
            return made

        monkeypatch.setattr(optimized, "pack", watched)
        before = live_bytes()
        optimize(model)
        after = live_bytes()
    slack = 512 * len(seen)  # a cache line, and biases in fp32, of each FFN
    assert before + layer // 8 < max(seen) <= before + layer + slack
    assert abs(after - before) <= slack


def test_the_public_names_optimise(tmp_path: Path) -> None:
    model = make("llama")
    save(model, tmp_path / "folder")
    fast = moe_tools.load(tmp_path / "folder", optimize=True)
    assert packed_kinds(fast) == {NATIVE}
    assert torch.equal(logits(fast), logits(moe_tools.optimize(model)))
    assert moe_tools.optimize(load(tmp_path / "folder")) is not None


def test_a_plain_call_needs_no_no_grad() -> None:
    ids = torch.randint(3, 64, (1, 3))
    assert not optimised(make("llama"))(ids).logits.requires_grad


# --- what cannot be optimised ---------------------------------------------------------------------


def refuse(model: PreTrainedModel, message: str, **options: Any) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        optimize(model, **options)
    for key, value in model.state_dict().items():
        assert torch.equal(before[key], value)


def test_refusals_change_nothing_and_say_why() -> None:
    refuse(make("llama").train(), r"is in training mode: call model.eval\(\) first")
    refuse(make("llama"), "cannot be packed as torch.float64", dtype=torch.float64)
    refuse(make("llama"), "unknown backend 'gpu'", backend="gpu")
    soft = make("llama")
    set_mode(soft, "soft")
    refuse(soft, r"every expert runs in mode soft \(2 FFNs\)")


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        (replace(THRESHOLD, router="representative"), "RepresentativeRouter reads the FFN's own"),
        (replace(THRESHOLD, router="oracle"), "OracleRouter reads the FFN's own"),
        (replace(THRESHOLD, router="int8_gate"), "Int8GateRouter reads the FFN's own"),
    ],
)
def test_ffns_that_need_their_linears_are_refused(conversion: Conversion, message: str) -> None:
    from moe_tools.experts.conversion import attach_experts

    model = build("llama")
    attach_experts(model, conversion)
    refuse(model, message)


def test_an_activation_without_a_kernel_is_refused() -> None:
    refuse(make("llama", hidden_act="quick_gelu"), "no kernel computes QuickGELUActivation")


def test_what_cannot_be_packed_is_left_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    expert_ffns(model)[1].mode = "soft"
    before = logits(model)
    with caplog.at_level(logging.WARNING, "moe_tools"):
        optimize(model)
    assert "left as they are: every expert runs in mode soft (1 FFNs)" in caplog.text
    assert [ffn.packed is None for ffn in expert_ffns(model)] == [False, True]
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_experts_that_are_off_may_give_their_mean(family: str, dtype: torch.dtype | None) -> None:
    model = make(family)
    for ffn in expert_ffns(model):
        ffn.off_F = torch.randn(48)
    fast = optimised(model, dtype=dtype)
    tolerance = 2e-5 if dtype is None else 0.1
    torch.testing.assert_close(logits(fast), logits(model), atol=tolerance, rtol=tolerance)
    if dtype is None:
        for key, tensor in model.state_dict().items():
            assert torch.equal(fast.state_dict()[key], tensor)


def test_the_head_multiplies_the_last_token_of_a_prompt_as_a_matrix() -> None:
    """As a batch, it would copy its weights: `aten::bmm` in place of `aten::mm`."""
    model = make("llama")
    ids = torch.randint(3, 64, (1, 7))
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        optimised(model)(ids, logits_to_keep=1)
    # The plain model has one in some builds of torch, none in others. A host's own small batches,
    # as those of rotary positions in some versions, are no matter.
    batches = [event.input_shapes for event in profile.events() if event.name == "aten::bmm"]
    vocabulary = model.config.vocab_size
    assert not [sizes for shapes in batches for sizes in shapes if vocabulary in sizes], batches


def test_routers_compute_in_the_dtype_that_they_are_kept_in(tmp_path: Path) -> None:
    model = make("llama").bfloat16()
    fast = optimised(model)
    for ffn in expert_ffns(fast):
        assert {parameter.dtype for parameter in ffn.router.parameters()} == {torch.float32}
    for key, tensor in model.state_dict().items():
        assert fast.state_dict()[key].dtype == tensor.dtype
        assert torch.equal(fast.state_dict()[key], tensor)


# --- copies, casts and moves ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["routed", "dense"])
def test_a_copy_computes_the_same_and_shares_what_is_packed(kind: str) -> None:
    model = make("llama") if kind == "routed" else make_dense("llama", {"kind": "relu"})
    fast = optimize(model)
    copied = copy.deepcopy(fast)
    assert torch.equal(logits(copied), logits(fast))
    pairs = zip(grafted_ffns(copied), grafted_ffns(fast), strict=True)
    assert all(one.packed is other.packed for one, other in pairs)  # type: ignore[attr-defined]
    before, after = fast.state_dict(), copied.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_cast_reaches_all_but_what_is_packed() -> None:
    model = make("llama")
    fast = optimised(model).bfloat16()
    assert logits(fast).dtype == torch.bfloat16
    torch.testing.assert_close(logits(fast).float(), logits(model), atol=0.1, rtol=0.1)
    assert {tensor.dtype for tensor in fast.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(logits(fast.to("cpu")), logits(fast))


@pytest.mark.parametrize("kind", ["routed", "dense"])
def test_another_device_is_refused(kind: str) -> None:
    model = make("llama") if kind == "routed" else make_dense("llama", {"kind": "relu"})
    message = r"layers\.0\.mlp is packed for cpu and cannot go to meta: load the model again there"
    with pytest.raises(ValueError, match=message):
        optimize(model).to("meta")


# --- screen and linears ---------------------------------------------------------------------------


@pytest.mark.parametrize("spec", EXACT, ids=lambda spec: spec["kind"])
@pytest.mark.parametrize("screen", [4.0, math.inf])
def test_a_screened_gate_changes_nothing(spec: dict[str, Any], screen: float) -> None:
    model = make_dense("llama", spec)
    fast = optimised(model, screen=screen)
    torch.testing.assert_close(logits(fast), logits(model), atol=2e-5, rtol=1e-5)


def test_a_gate_without_zeros_is_not_screened() -> None:
    refuse(make("llama"), r"layers\.0\.mlp: a screen needs an activation that is zero", screen=4.0)


@pytest.mark.parametrize("linears", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_quantized_linears_are_close_and_not_saved(
    linears: Any, tokens: int, tmp_path: Path
) -> None:
    model = make("llama", hidden_size=64, vocab_size=64)
    fast = optimised(model, linears=linears)
    names = {name for name, m in fast.named_modules() if isinstance(m, PackedLinear)}
    assert "lm_head" in names and "model.layers.1.self_attn.o_proj" in names
    assert len(names) == 1 + 4 * 2  # neither FFNs nor routers
    ids = torch.randint(3, 64, (1, tokens))
    with torch.no_grad(), every_expert_on(model), every_expert_on(fast):  # or routing differs
        expected, found = model(ids).logits, fast(ids).logits
    error = (found - expected).norm() / expected.norm()
    assert error < {"int8": 0.02, "int4": 0.3}[linears]
    with pytest.raises(ValueError, match="is quantized, which lost digits: save the model"):
        save(fast, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_refusal_comes_before_the_first_change() -> None:
    refuse(make("llama"), r"layers\.0\.mlp: a screen needs", screen=4.0, linears="int8")
    mixed = make("llama")
    expert_ffns(mixed)[1].act_fn = nn.ReLU()
    refuse(mixed, r"layers\.0\.mlp: a screen needs an activation", screen=4.0, linears="int8")


def test_where_no_linear_can_be_quantized_that_is_said() -> None:
    headless = make("gpt2")
    headless.lm_head = nn.Identity()
    refuse(headless, "no linear to quantize as int8", linears="int8")
    refuse(
        make("llama").double(),
        r"is torch.float64: linears are quantized from fp32, bf16 and fp16",
        linears="int8",
    )


def test_linears_that_stay_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Adapted(nn.Linear):
        pass

    model = make("llama", hidden_size=64)
    model.lm_head = Adapted(64, 64)
    with caplog.at_level(logging.WARNING, "moe_tools"):
        fast = optimised(model, linears="int4")
    assert type(fast.lm_head) is Adapted
    (record,) = caplog.records
    assert record.getMessage() == (
        "LlamaForCausalLM: linears that stay as they are: a Adapted, no plain linear (1 linears)"
    )


@pytest.mark.parametrize("tokens", [1, 40])
def test_linears_that_keep_their_dtype_compute_the_same(tokens: int, tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=True)
    fast = optimised(model)
    assert not [name for name, module in fast.named_modules() if type(module) is nn.Linear]
    assert fast.lm_head.weight is fast.model.embed_tokens.weight
    ids = torch.randint(3, 64, (1, tokens))
    for made in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with torch.no_grad():
            torch.testing.assert_close(made(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-5)
        assert made.lm_head.weight is made.model.embed_tokens.weight
    before, after = model.state_dict(), fast.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    save(fast, tmp_path / "out")
    assert torch.equal(logits(load(str(tmp_path / "out"), dtype=torch.float32)), logits(model))


def test_a_packed_linear_has_no_gradients() -> None:
    linear = optimised(build("llama")).lm_head
    with pytest.raises(ValueError, match="has no gradients: call it under"):
        linear(torch.randn(1, 16, requires_grad=True))


def test_linears_of_a_named_backend_stay() -> None:
    fast = optimised(make("llama"), backend="reference")
    assert type(fast.lm_head) is nn.Linear


@pytest.mark.parametrize("linears", ["int8", "int4"])
def test_a_dense_model_has_all_its_linears_quantized(
    linears: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("llama", hidden_size=32, intermediate_size=64)
    fast = optimize(copy.deepcopy(model), linears=linears)
    left = [name for name, module in fast.named_modules() if type(module) is nn.Linear]
    assert left == [] and not caplog.records
    error = (logits(fast) - logits(model)).norm() / logits(model).norm()
    assert 0 < error < {"int8": 0.02, "int4": 0.3}[linears]


def test_few_bits_propose_from_packed_copies() -> None:
    """The FFN's own rows are freed; what proposes keeps its few bits, and masks are the same."""
    model = build("llama", hidden_size=32)
    spec = {"kind": "threshold", "tau": 0.05}
    attach_experts(model, Conversion("donor", 1, "few_bits", spec, router_options={"bits": 3}))
    before, plain = logits(model), copy.deepcopy(model)
    fast = optimize(model)
    x_TD = torch.randn(5, 32)
    for mine, other in zip(expert_ffns(fast), expert_ffns(plain), strict=True):
        masks = [ffn.route(x_TD).mask_TE for ffn in (mine, other)]
        assert (masks[0] != masks[1]).float().mean() < 0.02  # the kernel rounds scales to bf16
        assert 0 < masks[0].float().mean() < 1
    assert torch.allclose(logits(fast), before, atol=0.05)
    eight = build("llama", hidden_size=32)
    attach_experts(eight, Conversion("donor", 1, "few_bits", spec, router_options={"bits": 8}))
    refuse(eight, "proposals in 8 bits: there is no kernel for them, take 4 or fewer")


def test_linears_of_an_unknown_kind_are_refused() -> None:
    refuse(make("llama"), "unknown linears 'int2'; known: int8, int4", linears="int2")


def test_once_is_enough() -> None:
    routed_model, dense = make("llama"), make_dense("llama", {"kind": "relu"})
    with pytest.raises(ValueError, match=r"no FFN to optimise: optimised already \(2 FFNs\)"):
        optimize(optimize(routed_model))
    with pytest.raises(ValueError, match="is optimised already: start from the dense model"):
        optimize(optimize(dense))
    with pytest.raises(ValueError, match="is optimised already: start from the dense model"):
        find_ffns(dense)


@pytest.mark.parametrize("kind", ["routed", "dense"])
def test_an_optimised_model_does_not_train(kind: str) -> None:
    model = make("llama") if kind == "routed" else make_dense("llama", {"kind": "relu"})
    optimize(model)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp is optimised and cannot"):
        logits(model.train())


def test_nor_does_it_score_softly() -> None:
    model = optimised(make("llama"))
    set_mode(model, "soft")
    with pytest.raises(ValueError, match="is optimised and cannot run in mode soft: load it again"):
        logits(model)


def test_straight_is_hard_where_nothing_is_trained() -> None:
    model = make("llama")
    set_mode(model, "straight")
    torch.testing.assert_close(logits(optimised(model)), logits(model), atol=2e-5, rtol=1e-5)


def test_an_adapter_is_not_skipped() -> None:
    class Adapted(nn.Linear):
        pass

    model = make("llama")
    for ffn in expert_ffns(model):
        ffn.down_proj = Adapted(48, 16)  # type: ignore[assignment]
    refuse(model, "a projection is a Adapted, no plain linear")


def test_a_quantized_weight_is_not_skipped() -> None:
    """As those of torchao: a plain linear, but not a plain weight."""

    class Quantized(nn.Parameter):
        pass

    model = make("llama")
    for ffn in expert_ffns(model):
        linear = ffn.down_proj
        linear.weight = Quantized(linear.weight.detach())  # type: ignore[union-attr]
    refuse(model, "the weight of a projection is a Quantized, no plain parameter")


# --- without the extension ------------------------------------------------------------------------


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in an install without a compiler."""

    def isas() -> list[str]:
        raise ValueError("the native CPU kernels are not there")

    monkeypatch.setattr("moe_tools.kernels.sparse_ffn.isas", isas)
    native_cpu.cache_clear()
    yield
    native_cpu.cache_clear()


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("dtype", [torch.int8, torch.int4], ids=str)
def test_without_the_extension_few_bits_are_refused(dtype: torch.dtype) -> None:
    """PyTorch would only round the weights: less quality, and as much memory as before."""
    message = (
        rf"layers\.0\.mlp: no kernel reads {dtype} here, .*backend='reference' to round on purpo"
    )
    refuse(make("llama"), message, dtype=dtype)
    refuse(make("llama"), message, dtype=dtype, linears="int8")
    refuse(make_dense("llama", {"kind": "relu"}), message, dtype=dtype)


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_so_they_are_on_the_command_line(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(make("llama"), tmp_path, tokenizer())
    words = ["generate", str(tmp_path), "--prompt", "a b", "--optimize", "--max-new-tokens", "1"]
    assert main([*words, "--packed-dtype", dtype]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no kernel reads torch.{dtype} here" in line


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4], ids=str)
def test_the_reference_rounds_where_it_is_named(dtype: torch.dtype) -> None:
    model = make("llama")
    fast = optimised(model, dtype=dtype, backend="reference")
    expected = logits(model)
    error = (logits(fast) - expected).norm() / expected.norm()
    assert 0 < error < (0.3 if dtype == torch.int4 else 0.05)


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_without_the_extension_pytorch_computes_and_the_log_says_so_once(
    dtype: torch.dtype | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("phi3")
    with caplog.at_level(logging.WARNING, "moe_tools.kernels"):
        fast = optimised(model, dtype=dtype)
        optimised(model)
    assert caplog.text.count("sparse_ffn runs on PyTorch alone") == 1
    assert packed_kinds(fast) == {"ReferenceFFN"}
    tolerance = 2e-5 if dtype is None else 0.1
    torch.testing.assert_close(logits(fast), logits(model), atol=tolerance, rtol=tolerance)


def test_a_backend_can_be_named() -> None:
    model = make("llama")
    fast = optimised(model, backend="reference")
    assert packed_kinds(fast) == {"ReferenceFFN"}
    torch.testing.assert_close(logits(fast), logits(model), atol=2e-5, rtol=1e-5)
