"""Models that compute a new token of all layers in one call: which, and that nobody can tell."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.models.llama import modeling_llama

from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.intervene import intervene
from moe_tools.experts.routers import SigmoidRouter
from moe_tools.experts.routing import record_routing
from moe_tools.experts.selectors import Threshold, TopK
from moe_tools.inference.fused_stack import FusedStack
from moe_tools.inference.optimized import optimize
from moe_tools.kernels.cpu.decoder_layer import CpuDecoderLayer, CpuStack
from tests.families import THRESHOLD, build, randomize

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "eos_token_id": None,
    "pad_token_id": 0,
}
"""Heads of fp32 fill a cache line."""
LAYERS = 3
STEPS = 3
NEAR = {"atol": 2e-5, "rtol": 1e-5}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
KINDS = ("dense", "few bits")
TAU = 1e-3


class Calls:
    """How often the kernels computed all layers, and one of them."""

    def __init__(self) -> None:
        self.all = self.one = 0

    def during(self, work: Callable[[], Any]) -> tuple[int, int]:
        self.all = self.one = 0
        work()
        return self.all, self.one


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made, together, alone = Calls(), CpuStack.__call__, CpuDecoderLayer.new_token

    def all_layers(self: CpuStack, *args: Any, **options: Any) -> Any:
        made.all += 1
        return together(self, *args, **options)

    def one_layer(self: CpuDecoderLayer, *args: Any) -> Any:
        made.one += 1
        return alone(self, *args)

    monkeypatch.setattr(CpuStack, "__call__", all_layers)
    monkeypatch.setattr(CpuDecoderLayer, "new_token", one_layer)
    return made


def few_bits(tau: float = TAU, **options: Any) -> Conversion:
    options = {"bits": 4, "x_bits": 8} | options
    selector = {"kind": "threshold", "tau": tau}
    return Conversion("donor", 1, "few_bits", selector, router_options=options)


def make(family: str = "llama", kind: str = "dense", **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build(family, **SIZES | config)
    if kind == "few bits":
        attach_experts(model, few_bits())
    return model


def pair(family: str = "llama", kind: str = "dense", **config: Any) -> tuple[Any, Any]:
    """An optimised model, and what it was made of."""
    model = make(family, kind, **config)
    return optimize(copy.deepcopy(model)), model


def layers_of(model: Any) -> list[Any]:
    return list(model.model.layers)


def prompt(rows: int = 2, tokens: int = 7) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def stepped(model: Any, cache: Cache | None = None, rows: int = 2) -> Tensor:
    """Logits of a prompt and of some tokens behind it, through a cache."""
    cache = DynamicCache() if cache is None else cache
    made = [model(prompt(rows), past_key_values=cache).logits[:, -1:]]
    ids = prompt(rows, STEPS)
    made += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(STEPS)]
    return torch.cat(made, dim=1)


def assert_same_steps(fast: Any, model: Any) -> None:
    torch.testing.assert_close(stepped(fast), stepped(model), **NEAR)


def begun(model: Any, rows: int = 2) -> DynamicCache:
    """A cache behind a prompt and one token."""
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt(rows), past_key_values=cache)
        model(prompt(rows, 1), past_key_values=cache)
    return cache


def numbers_in(cache: DynamicCache) -> list[Tensor]:
    return [part.clone() for layer in cache.layers for part in (layer.keys, layer.values)]


def doubled(_: nn.Module, __: Any, y: Any) -> Any:
    return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y


# --- which models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_token_is_one_call(family: str, kind: str, calls: Calls) -> None:
    fast, model = pair(family, kind)
    assert calls.during(lambda: stepped(fast)) == (STEPS, 0)
    assert_same_steps(fast, model)


@pytest.mark.parametrize(
    ("family", "conversion"),
    [
        ("gemma", None),
        ("gemma3", None),
        ("mixtral", None),
        ("qwen3_moe", None),
        ("llama", Conversion("donor", 8, "mlp", {"kind": "threshold", "tau": 0.5})),
        ("llama", Conversion("donor", 8, "sigmoid", {"kind": "top_p", "p": 0.7})),
        ("llama", few_bits(inputs=0.5)),
    ],
)
def test_which_models_are_not_stacked(
    family: str, conversion: Conversion | None, calls: Calls
) -> None:
    """Embeddings that are scaled, masks of two kinds, experts, routers without a proposal."""
    model = make(family)
    if conversion is not None:
        attach_experts(model, conversion)
        if conversion.router == "sigmoid":
            randomize(model)
    fast = optimize(copy.deepcopy(model))
    assert calls.during(lambda: stepped(fast)) == (0, LAYERS * STEPS)


def test_another_default_dtype_changes_nothing(calls: Calls) -> None:
    """As of a model that is made in bf16: the proof is in fp32 all the same."""
    model = make()
    torch.set_default_dtype(torch.bfloat16)
    try:
        fast = optimize(copy.deepcopy(model))
    finally:
        torch.set_default_dtype(torch.float32)
    assert calls.during(lambda: stepped(fast)) == (STEPS, 0)
    assert_same_steps(fast, model)


@pytest.mark.parametrize(
    "conversion",
    [
        THRESHOLD,
        Conversion("donor", 8, "sigmoid", {"kind": "topk", "k": 3}),
        Conversion("donor", 1, "bottleneck", {"kind": "topk", "k": 20}),
    ],
    ids=["threshold", "top-k", "bottleneck"],
)
def test_experts_that_a_sigmoid_chooses_are_stacked(conversion: Conversion, calls: Calls) -> None:
    model = make("llama")
    attach_experts(model, conversion)
    randomize(model)
    fast = optimize(copy.deepcopy(model))
    assert calls.during(lambda: stepped(fast)) == (STEPS, 0)
    assert_same_steps(fast, model)
    for ffn in expert_ffns(fast):  # another number of experts, another kind
        ffn.selector = TopK(2)
    for ffn in expert_ffns(model):
        ffn.selector = TopK(2)
    whole = conversion is not THRESHOLD
    assert calls.during(lambda: stepped(fast)) == ((STEPS, 0) if whole else (0, LAYERS * STEPS))
    assert_same_steps(fast, model)


class Doubled(modeling_llama.LlamaDecoderLayer):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward(*args, **kwargs)


def test_a_layer_of_another_code_leaves_the_others_alone(calls: Calls) -> None:
    model = cast("Any", make())
    model.model.layers[1].__class__ = Doubled
    fast = cast("Any", optimize(copy.deepcopy(model)))
    assert not isinstance(fast.model, FusedStack)
    assert calls.during(lambda: stepped(fast)) == (0, (LAYERS - 1) * STEPS)
    assert_same_steps(fast, model)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_of_two_kinds_of_masks_are_not_stacked(family: str, calls: Calls) -> None:
    given = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    fast, model = pair(family, **given)
    assert len(set(model.config.layer_types)) == 2
    assert calls.during(lambda: stepped(fast)) == (0, LAYERS * STEPS)
    assert_same_steps(fast, model)


# --- texts ----------------------------------------------------------------------------------------


def generated(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    given = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    made = model.generate(**given | {"return_dict_in_generate": True} | options)
    return made.sequences, torch.stack(made.logits)


@pytest.mark.parametrize("options", [
    {},
    {"max_new_tokens": 80},
    {"num_beams": 3},
    {"use_cache": False},
    {"cache_implementation": "static"},
], ids=lambda options: "-".join(options) or "plain")  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_texts_of_padded_batches_stay(
    family: str, kind: str, options: dict[str, Any], calls: Calls
) -> None:
    fast, model = pair(family, kind)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = mask[2, :6] = 0
    options = {"input_ids": prompt(3), "attention_mask": mask} | options
    made = calls.during(lambda: generated(fast, **options))
    stacked = "use_cache" not in options and "cache_implementation" not in options
    assert made[0] == (options.get("max_new_tokens", 6) - 1 if stacked else 0)
    (ids, logits), (expected_ids, expected) = (generated(one, **options) for one in (fast, model))
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logits, expected, **NEAR)


def test_sliding_windows_are_computed_layer_by_layer(calls: Calls) -> None:
    fast, model = pair("mistral", sliding_window=4)
    options = {"input_ids": prompt()}
    assert calls.during(lambda: generated(fast, **options)) == (0, LAYERS * 5)
    (_, logits), (_, expected) = (generated(one, **options) for one in (fast, model))
    torch.testing.assert_close(logits, expected, **NEAR)
    assert_same_steps(fast, model)  # the same window by its mask, in a cache without one


# --- layers by hand, hooks ------------------------------------------------------------------------


def by_hand(model: Any, which: int, h_B1D: Tensor) -> tuple[Tensor, list[int]]:
    """What a layer makes of h behind a prompt, and the positions of every cache."""
    cache = begun(model)
    position = torch.tensor([[8]])
    embedded = model.model.rotary_emb(h_B1D, position_ids=position)
    with torch.no_grad():
        made = model.model.layers[which](
            h_B1D,
            position_embeddings=embedded,
            position_ids=position,
            past_key_values=cache,
            attention_mask=None,
        )
    return made, [cache.get_seq_length(layer) for layer in range(LAYERS)]


@pytest.mark.parametrize("which", range(LAYERS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_called_by_hand_gives_its_own_output(
    which: int, kind: str, calls: Calls
) -> None:
    fast, model = pair(kind=kind)
    h_B1D = torch.randn(2, 1, 32)
    ours, theirs = by_hand(fast, which, h_B1D), by_hand(model, which, h_B1D)
    torch.testing.assert_close(ours[0], theirs[0], **NEAR)
    assert ours[1] == theirs[1] == [9 if layer == which else 8 for layer in range(LAYERS)]
    assert_same_steps(fast, model)


HOOKED = ("", "input_layernorm", "self_attn", "self_attn.k_proj", "mlp")
HOOKED_ROUTED = ("", "mlp", "mlp.router")


@pytest.mark.parametrize("which", range(LAYERS))
@pytest.mark.parametrize(
    ("kind", "path"),
    [("dense", path) for path in HOOKED] + [("few bits", path) for path in HOOKED_ROUTED],
)
def test_hooks_are_heard_and_may_change_things(
    kind: str, path: str, which: int, calls: Calls
) -> None:
    fast, model = pair(kind=kind)
    stepped(fast)
    handles = [
        layers_of(host)[which].get_submodule(path).register_forward_hook(doubled)
        for host in (fast, model)
    ]
    assert calls.during(lambda: assert_same_steps(fast, model))[0] == 0
    for handle in handles:
        handle.remove()
    assert calls.during(lambda: assert_same_steps(fast, model))[0] == STEPS


@pytest.mark.parametrize("path", ["", "mlp", "mlp.router"])
def test_so_are_hooks_in_front(path: str, calls: Calls) -> None:
    fast, model = pair(kind="few bits")
    seen: list[nn.Module] = []

    def halve(module: nn.Module, args: tuple[Any, ...]) -> Any:
        seen.append(module)
        return (args[0] / 2, *args[1:])

    for host in (fast, model):
        layers_of(host)[1].get_submodule(path).register_forward_pre_hook(halve)
    assert calls.during(lambda: stepped(fast))[0] == 0
    assert len(seen) == 1 + STEPS
    assert_same_steps(fast, model)


def test_global_hooks_see_the_routers_too() -> None:
    fast, _ = pair(kind="few bits")
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda one, *_: seen.append(one))
    try:
        stepped(fast)
    finally:
        handle.remove()
    routers = [ffn.router for ffn in expert_ffns(fast)]
    assert all(seen.count(router) == 1 + STEPS for router in routers)


def test_what_stands_around_the_layers_may_be_hooked(calls: Calls) -> None:
    fast, model = pair()
    for host in (fast, model):
        for path in ("embed_tokens", "norm"):
            host.model.get_submodule(path).register_forward_hook(doubled)
    assert calls.during(lambda: stepped(fast)) == (STEPS, 0)
    assert_same_steps(fast, model)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_states_and_attentions_are_the_hosts(name: str) -> None:
    model = make()
    model.set_attn_implementation("eager")
    fast = optimize(copy.deepcopy(model))
    made = []
    for host in cast("list[Any]", [fast, model]):
        with torch.no_grad():
            made.append(host(prompt(2, 1), past_key_values=begun(host), **{name: True}))
    one, other = (getattr(each, name.removeprefix("output_")) for each in made)
    assert len(one) == len(other)
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, **NEAR)
    assert_same_steps(fast, model)


# --- layers that change ---------------------------------------------------------------------------


def fewer_by_config(model: Any) -> None:
    model.config.num_hidden_layers = LAYERS - 1


def fewer_in_a_new_list(model: Any) -> None:
    model.model.layers = model.model.layers[:-1]


def last_removed(model: Any) -> None:
    del model.model.layers[-1]
    model.config.num_hidden_layers = LAYERS - 1


def exchanged(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def exchanged_in_a_new_list(model: Any) -> None:
    first, second, *rest = model.model.layers
    model.model.layers = nn.ModuleList([second, first, *rest])


def replaced(model: Any) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[2])
    model.model.layers[1].self_attn.layer_idx = 1


def cast_there_and_back(model: Any) -> None:
    """The same numbers; what was prepared of this layer is gone."""
    model.model.layers[1].float()


def trained(model: Any) -> None:
    model.model.layers[1].train()


def run_twice(model: Any) -> None:
    model.model.layers.append(model.model.layers[-1])
    model.config.num_hidden_layers = LAYERS + 1


CHANGES = (fewer_by_config, fewer_in_a_new_list, last_removed, exchanged, replaced)
CHANGES += (exchanged_in_a_new_list, cast_there_and_back, trained, run_twice)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["at once", "later"])
def test_layers_that_change_are_followed(change: Any, kind: str, when: str, calls: Calls) -> None:
    fast, model = pair(kind=kind)
    if kind == "few bits" and change is trained:
        pytest.skip("an optimised FFN refuses that")
    if when == "later":
        stepped(fast)
    for host in (fast, model):
        change(host)
    assert_same_steps(fast, model)
    if change is not cast_there_and_back:
        again = copy.deepcopy(fast)
        assert_same_steps(again, model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [one for one in CHANGES if one is not trained])
def test_so_they_are_behind_a_cache_that_was_begun_before(change: Any, kind: str) -> None:
    made = []
    for host in pair(kind=kind):
        cache = begun(host)
        change(host)
        with torch.no_grad():
            for _ in range(2):
                made.append(host(prompt(2, 1), past_key_values=cache).logits)
        made += numbers_in(cache)
    half = len(made) // 2
    torch.testing.assert_close(made[:half], made[half:], **NEAR)


def test_a_part_of_a_layer_that_is_replaced_is_honoured(calls: Calls) -> None:
    fast, model = pair()
    stepped(fast)
    for host in (fast, model):
        layers_of(host)[2].mlp = nn.Identity()
    assert calls.during(lambda: stepped(fast))[0] == 0
    assert_same_steps(fast, model)


def test_so_is_an_ffn_whose_neurons_are_proposed(calls: Calls) -> None:
    fast, model = pair(kind="few bits")
    stepped(fast)
    for host in (fast, model):
        layers_of(host)[2].mlp = nn.Identity()
    assert calls.during(lambda: stepped(fast))[0] == 0
    assert_same_steps(fast, model)


def test_so_is_its_router(calls: Calls) -> None:
    fast, model = pair(kind="few bits")
    stepped(fast)
    torch.manual_seed(2)
    router = SigmoidRouter(32, 48)
    nn.init.normal_(router.weight), nn.init.zeros_(router.bias)
    for host in (fast, model):
        ffn = expert_ffns(host)[1]
        ffn.router, ffn.selector = copy.deepcopy(router).requires_grad_(False), Threshold(0.5)
    assert calls.during(lambda: stepped(fast))[0] == 0
    assert_same_steps(fast, model)


@pytest.mark.parametrize("path", ["", "mlp", "mlp.router"])
def test_a_forward_of_its_own_is_honoured(path: str, calls: Calls) -> None:
    """As accelerate sets it."""
    fast, model = pair(kind="few bits")
    stepped(fast)
    for host in (fast, model):
        part = layers_of(host)[1].get_submodule(path)
        before = part.forward
        part.forward = lambda *args, before=before, **given: 2 * before(*args, **given)
    assert calls.during(lambda: stepped(fast))[0] == 0
    assert_same_steps(fast, model)


# --- selectors, observers, interventions ----------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, 0.02, 1e9])
def test_another_tau_is_followed(tau: float, calls: Calls) -> None:
    fast, model = pair(kind="few bits")
    before = stepped(fast)
    for host in (fast, model):
        expert_ffns(host)[1].selector = Threshold(tau)
    assert calls.during(lambda: stepped(fast)) == (STEPS, 0)
    assert not torch.equal(stepped(fast), before)
    assert_same_steps(fast, model)


def test_another_selector_is_followed(calls: Calls) -> None:
    fast, model = pair(kind="few bits")
    stepped(fast)
    for host in (fast, model):
        expert_ffns(host)[1].selector = TopK(k=5)
    assert calls.during(lambda: stepped(fast))[0] == 0
    assert_same_steps(fast, model)


def test_observers_see_every_decision(calls: Calls) -> None:
    fast, model = pair(kind="few bits")
    seen = []
    for host in (fast, model):
        with record_routing(host) as records:
            stepped(host)
        seen.append(records)
    assert len(seen[0]) == len(seen[1]) == LAYERS * (1 + STEPS)
    for ours, theirs in zip(*seen, strict=True):
        assert ours.ffn == theirs.ffn and torch.equal(ours.mask_TE, theirs.mask_TE)
        torch.testing.assert_close(ours.scores_TE, theirs.scores_TE, atol=1e-4, rtol=1e-4)
    assert calls.during(lambda: stepped(fast)) == (STEPS, 0)


def test_interventions_are_honoured(calls: Calls) -> None:
    fast, model = pair(kind="few bits")
    before, made = stepped(fast), []
    for host in (fast, model):
        with intervene(host, off={1: list(range(24))}):
            made.append(stepped(host))
        with intervene(host, tau=0.02):
            made.append(stepped(host))
    torch.testing.assert_close(made[:2], made[2:], **NEAR)
    assert not torch.equal(made[0], before)
    assert torch.equal(stepped(fast), before)


def test_constants_are_added_and_followed() -> None:
    model = make(kind="few bits")
    for ffn in expert_ffns(model):
        ffn.add_constants()
        assert ffn.bias_D is not None
        ffn.bias_D.normal_()
    fast = optimize(copy.deepcopy(model))
    assert_same_steps(fast, model)
    for host in (fast, model):
        for change in (lambda bias_D: bias_D.mul_(2), lambda bias_D: bias_D / 3):
            for ffn in expert_ffns(host):
                ffn.bias_D = change(ffn.bias_D)
    assert_same_steps(fast, model)


# --- caches ---------------------------------------------------------------------------------------


def test_static_caches_are_computed_layer_by_layer(calls: Calls) -> None:
    fast, model = pair()
    caches = [StaticCache(config=model.config, max_cache_len=20) for _ in range(2)]
    made: list[Tensor] = []
    assert calls.during(lambda: made.append(stepped(fast, caches[0]))) == (0, LAYERS * STEPS)
    torch.testing.assert_close(made[0], stepped(model, caches[1]), **NEAR)


def test_a_cache_of_another_batch_is_refused_as_the_host_does(calls: Calls) -> None:
    fast, model = pair()
    for host in (fast, model):
        cache = begun(host)
        before = numbers_in(cache)
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
            host(prompt(3, 1), past_key_values=cache)
        assert all(map(torch.equal, numbers_in(cache), before))


@pytest.mark.parametrize("change", [
    lambda part: part[:, :1].repeat(1, 3, 1, 1),
    lambda part: part[:, :1],
    lambda part: part[..., :8],
], ids=["more heads", "fewer heads", "smaller heads"])  # fmt: skip
def test_a_cache_of_other_heads_is_refused_too(change: Any, calls: Calls) -> None:
    """The kernels would read and write beside it."""
    fast, _ = pair()
    cache = begun(fast)
    for layer in cache.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)
    with torch.no_grad(), pytest.raises(RuntimeError):
        fast(prompt(2, 1), past_key_values=cache)
    assert calls.all == 1


def test_values_of_fewer_positions_are_computed_layer_by_layer(calls: Calls) -> None:
    """The kernels would read behind their end."""
    fast, _ = pair()
    cache = begun(fast)
    for layer in cache.layers:
        layer.values = layer.values[:, :, :1]
    stack = fast.model._prepared()
    assert stack is not None and stack._room(cache, 2) is None


def test_a_cache_of_another_dtype_is_the_hosts(calls: Calls) -> None:
    made, hosts = [], pair()
    calls.one = 0
    for host in hosts:
        cache = begun(host)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
        with torch.no_grad():
            made += [host(prompt(2, 1), past_key_values=cache).logits, *numbers_in(cache)]
    half = len(made) // 2
    # a last place of bf16 may be another one
    torch.testing.assert_close(made[:half], made[half:], atol=1e-2, rtol=1e-2)
    assert (calls.all, calls.one) == (1, LAYERS)


def test_a_cache_that_is_shorter_in_one_layer_is_computed_layer_by_layer(calls: Calls) -> None:
    made, hosts = [], pair()
    calls.one = 0
    for host in hosts:
        cache = begun(host)
        cache.layers[1].crop(-2)
        with torch.no_grad():
            made += [host(prompt(2, 1), past_key_values=cache).logits]
    assert (calls.all, calls.one) == (1, LAYERS)  # the first is of `begun`
    torch.testing.assert_close(*made, **NEAR)


def test_an_error_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, model = pair()
    cache, other = begun(fast), begun(model)
    before = numbers_in(cache)

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(CpuStack, "__call__", fails)
        with pytest.raises(MemoryError):
            fast(prompt(2, 1), past_key_values=cache)
    assert all(map(torch.equal, numbers_in(cache), before))
    with torch.no_grad():
        ours, theirs = (
            host(prompt(2, 1), past_key_values=one).logits
            for host, one in ((fast, cache), (model, other))
        )
    torch.testing.assert_close(ours, theirs, **NEAR)


@pytest.mark.parametrize("of", ["keys", "values"])
@pytest.mark.parametrize("which", range(LAYERS))
def test_gradients_of_a_cache_are_not_dropped(of: str, which: int) -> None:
    fast, _ = pair()
    cache = begun(fast)
    layer = cache.layers[which]
    setattr(layer, of, getattr(layer, of).detach().clone().requires_grad_(True))
    with pytest.raises(ValueError, match="a packed linear has no gradients"):
        fast(prompt(2, 1), past_key_values=cache)


# --- threads, copies, casts, compile --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_two_threads_may_share_a_model(kind: str) -> None:
    """Also where both are the first to call it."""
    fast, _ = pair(kind=kind)
    expected = [stepped(copy.deepcopy(fast), rows=rows) for rows in (1, 3)]
    wrong: list[int] = []

    def work(model: Any, start: threading.Barrier, which: int) -> None:
        start.wait()
        for _ in range(2):
            if not torch.equal(stepped(model, rows=(1, 3)[which]), expected[which]):
                wrong.append(which)

    for _ in range(6):
        fresh, start = copy.deepcopy(fast), threading.Barrier(2)
        team = [threading.Thread(target=work, args=(fresh, start, i)) for i in range(2)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
    assert not wrong


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("first", [True, False])
def test_copies_stay_stacked_and_independent(
    kind: str, way: str, first: bool, calls: Calls
) -> None:
    fast, _ = pair(kind=kind)
    if first:
        stepped(fast)
    copied = COPIES[way](fast)
    expected = stepped(fast)
    assert type(copied.model) is type(fast.model)
    assert calls.during(lambda: stepped(copied)) == (STEPS, 0)
    assert torch.equal(stepped(copied), expected)
    for layer in layers_of(copied):
        layer.input_layernorm.weight.mul_(2)
    assert not torch.equal(stepped(copied), expected)
    assert torch.equal(stepped(fast), expected)


def test_a_cast_is_followed_there_and_back(calls: Calls) -> None:
    fast, model = pair(head_dim=32)
    expected = stepped(model)
    stepped(fast)
    fast.to(torch.bfloat16)
    made: list[Tensor] = []
    assert calls.during(lambda: made.append(stepped(fast))) == (STEPS, 0)
    assert made[0].dtype == torch.bfloat16
    torch.testing.assert_close(made[0].float(), expected, atol=0.1, rtol=0.05)
    fast.to(torch.float32)
    assert calls.during(lambda: made.append(stepped(fast))) == (STEPS, 0)
    torch.testing.assert_close(made[1], expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_the_same(kind: str, calls: Calls) -> None:
    fast, _ = pair(kind=kind)
    expected = stepped(fast, StaticCache(config=fast.config, max_cache_len=20))
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    made: list[Tensor] = []
    cache = StaticCache(config=fast.config, max_cache_len=20)
    assert calls.during(lambda: made.append(stepped(compiled, cache))) == (0, 0)
    torch.testing.assert_close(made[0], expected, **NEAR)
    torch._dynamo.reset()


# --- what neurons a proposal chooses --------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_the_mask_without_scores_gives_the_same_y(tokens: int) -> None:
    fast, _ = pair(kind="few bits")
    ffn = expert_ffns(fast)[0]
    assert isinstance(ffn, ExpertFFN) and ffn.unseen_selector() is ffn.selector
    x_TD = torch.randn(tokens, 32)
    ours = ffn(x_TD)
    seen: list[Any] = []
    ffn.observers.append(seen.append)
    assert torch.equal(ffn(x_TD), ours)
    assert len(seen) == 1 and 0 < seen[0].mask_TE.float().mean() < 1
