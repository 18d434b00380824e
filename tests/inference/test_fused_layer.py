"""Fused layers: which they are, that they compute, and that nobody sees a difference."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.inference.fused_layer import FusedLayer
from moe_tools.inference.optimized import optimize
from moe_tools.kernels.cpu.decoder_layer import MOST_SEQUENCES, CpuDecoderLayer, CpuStack
from tests.families import TABLE, THRESHOLD, build, of_size, randomize, routed

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
}
"""Heads of fp32 fill a cache line."""
LAYERS = 2
TOLERANCE = 2e-5
NATIVE, HOSTS = "the kernels", "the host"

FORMS = {
    "llama": [NATIVE, NATIVE],
    "mistral": [NATIVE, NATIVE],
    "qwen2": [NATIVE, NATIVE],
    "qwen3": [NATIVE, NATIVE],
    "gemma": [NATIVE, NATIVE],
    "gemma3": [NATIVE, NATIVE],
    "mixtral": [HOSTS, HOSTS],
    "qwen2_moe": [NATIVE, HOSTS],
    "qwen3_moe": [NATIVE, HOSTS],
}
"""Families whose layers are fused, and who computes the FFN of each."""
LEFT_OUT = ("bert", "roberta", "t5-relu", "t5-gated", "olmoe", "longcat")
"""No decoders, or none that may have heads of another width than D / H."""


class Calls:
    """How often the kernels computed a token of a layer, and with which FFN."""

    def __init__(self) -> None:
        self.ffns: list[str] = []

    def __len__(self) -> int:
        return len(self.ffns)

    @contextmanager
    def expected(self, count: int) -> Iterator[None]:
        self.ffns.clear()
        yield
        assert len(self.ffns) == count


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made, computed = Calls(), CpuDecoderLayer.new_token

    def counting(self: CpuDecoderLayer, *args: Any) -> Any:
        made.ffns.append(HOSTS if self.ffn is None else NATIVE)
        return computed(self, *args)

    together = CpuStack.__call__

    def counting_all(self: CpuStack, *args: Any, **options: Any) -> Any:
        made.ffns += [NATIVE] * len(self.layers)
        return together(self, *args, **options)

    monkeypatch.setattr(CpuDecoderLayer, "new_token", counting)
    monkeypatch.setattr(CpuStack, "__call__", counting_all)
    return made


def make(family: str = "llama", **config: Any) -> PreTrainedModel:
    return build(family, **SIZES | {"eos_token_id": None, "pad_token_id": 0} | config)


def optimised(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return optimize(copy.deepcopy(model), **options)


def layers_of(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


def prompt(rows: int = 2, tokens: int = 7) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))


def padded(rows: int = 3) -> dict[str, Tensor]:
    """Rows of one to seven tokens, padded on the left."""
    mask = torch.ones(rows, 7, dtype=torch.long)
    mask[1, :3] = mask[2, :6] = 0
    return {"input_ids": prompt(rows), "attention_mask": mask}


def generated(model: PreTrainedModel, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy ids, and the logits of every new token."""
    given = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    given |= {"return_dict_in_generate": True} | options
    if "input_ids" not in given:
        given["input_ids"] = prompt()
    made = cast("Any", model).generate(**given)
    return made.sequences, torch.stack(made.logits)


def assert_same_text(fast: PreTrainedModel, model: PreTrainedModel, **options: Any) -> None:
    ids, logits = generated(fast, **copy.deepcopy(options))
    expected_ids, expected_logits = generated(model, **copy.deepcopy(options))
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logits, expected_logits, atol=TOLERANCE, rtol=1e-5)


@torch.no_grad()
def stepped(model: PreTrainedModel, cache: Any = None, steps: int = 3) -> Tensor:
    """Logits of a prompt and of some tokens behind it, through a cache."""
    host: Any = model
    cache = DynamicCache() if cache is None else cache
    made = [host(prompt(), past_key_values=cache).logits[:, -1:]]
    ids = prompt(2, steps)
    made += [host(ids[:, i : i + 1], past_key_values=cache).logits for i in range(steps)]
    return torch.cat(made, dim=1)


def assert_same_steps(fast: PreTrainedModel, model: PreTrainedModel) -> None:
    torch.testing.assert_close(stepped(fast), stepped(model), atol=TOLERANCE, rtol=1e-5)


# --- which layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in TABLE if name not in LEFT_OUT])
def test_which_families_are_fused(
    family: str, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(family)
    with caplog.at_level(logging.INFO, "moe_tools.inference.fuse_layers"):
        fast = optimised(model)
    calls.ffns.clear()
    assert_same_text(fast, model)
    form = FORMS.get(family)
    assert calls.ffns == ([] if form is None else form * 5)
    said = f"{type(model).__name__}: {LAYERS} layers are fused"
    ours = [one.getMessage() for one in caplog.records if one.name.startswith("moe_tools.inf")]
    assert ours == ([said] if form else [])


@pytest.mark.parametrize(
    ("model", "config"), [(Olmo2ForCausalLM, Olmo2Config), (GraniteForCausalLM, GraniteConfig)]
)
def test_layers_of_another_code_are_left_alone(model: Any, config: Any, calls: Calls) -> None:
    """Norms of all heads together, and factors of what is added."""
    sizes = {"vocab_size": 64, "intermediate_size": 48, "pad_token_id": 0, "eos_token_id": None}
    sizes |= {name: value for name, value in SIZES.items() if name != "head_dim"}
    made = model(config(**sizes | {"hidden_size": 64})).eval()
    fast = optimised(made)
    assert not layers_of(fast)
    assert_same_text(fast, made)
    assert not len(calls)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"head_dim": 8}, "2 are not: a head of 8 numbers in torch.float32 fills no whole cache"),
        ({"hidden_size": 24}, "2 are not: its projections do not run on packed rows"),
    ],
)
def test_why_layers_are_not_fused_is_said(
    config: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("llama", **config, vocab_size=64)
    with caplog.at_level(logging.INFO, "moe_tools.inference.fuse_layers"):
        fast = optimised(model)
    assert not layers_of(fast) and said in caplog.text
    assert_same_text(fast, model)


def test_a_part_that_does_not_fit_is_no_crash() -> None:
    """The kernels would write behind its end."""
    model = make()
    for layer in cast("Any", model).model.layers:
        layer.self_attn.o_proj = nn.Linear(32, 32, bias=False)
    assert not layers_of(optimize(model))


def test_a_subclass_with_another_forward_is_left_alone(calls: Calls) -> None:
    class Doubled(modeling_llama.LlamaDecoderLayer):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    model = make()
    for layer in cast("Any", model).model.layers:
        layer.__class__ = Doubled
    fast = optimised(model)
    assert not layers_of(fast)
    calls.ffns.clear()
    assert_same_steps(fast, model)
    assert not len(calls)


def of_other_code(function: Callable[..., Any], **others: Any) -> FunctionType:
    """The same code, in which some names mean something else."""
    code = cast("FunctionType", function)
    made = FunctionType(code.__code__, code.__globals__ | others, code.__name__)
    made.__kwdefaults__, made.__defaults__ = code.__kwdefaults__, code.__defaults__
    return made


def twice(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Scales the queries once more."""
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    return q * 0.25, k


def backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turns the other way: relative positions change their sign."""
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, -sin)


@pytest.mark.parametrize("rotary", [twice, backwards])
@pytest.mark.parametrize("linears", [None, "int8"])
def test_a_layer_that_computes_something_else_is_not_fused(
    rotary: Any, linears: Any, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(modeling_llama.LlamaAttention):  # type: ignore[misc]
        pass

    Other.forward = of_other_code(  # type: ignore[method-assign]
        modeling_llama.LlamaAttention.forward, apply_rotary_pos_emb=rotary
    )
    model = make()
    for layer in cast("Any", model).model.layers:
        layer.self_attn.__class__ = Other
    with caplog.at_level(logging.INFO, "moe_tools.inference.fuse_layers"):
        fast = optimised(model, linears=linears)
    assert "0 layers are fused; 2 are not: the host's own numbers are others" in caplog.text
    assert not layers_of(fast)
    calls.ffns.clear()
    stepped(fast)
    assert not len(calls)


# --- what they compute ----------------------------------------------------------------------------

CONVERSIONS = {
    "threshold": THRESHOLD,
    "top-k": Conversion("donor", 8, "sigmoid", {"kind": "topk", "k": 3}),
    "bottleneck": Conversion("donor", 1, "bottleneck", {"kind": "threshold", "tau": 0.5}),
    "few bits": Conversion(
        "donor", 1, "few_bits", {"kind": "threshold", "tau": 0.0}, router_options={"bits": 4}
    ),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_converted_model_writes_the_same(family: str, conversion: str, calls: Calls) -> None:
    model = make(family)
    attach_experts(model, CONVERSIONS[conversion])
    if conversion != "few bits":
        randomize(model)
    fast = optimised(model)
    calls.ffns.clear()
    assert_same_text(fast, model, **padded())
    assert calls.ffns == [NATIVE] * LAYERS * 5


def test_a_routed_mixtral_writes_the_same(calls: Calls) -> None:
    model, _ = routed(make("mixtral"), of_size(10))
    randomize(model)
    fast = optimised(model)
    with calls.expected(LAYERS * 5):
        generated(fast)
    assert_same_text(fast, model, **padded())


@pytest.mark.parametrize("options", [
    {},
    {"use_cache": False},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 2},
    {"output_attentions": True, "output_hidden_states": True},
], ids=lambda options: "-".join(options) or "plain")  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_texts_of_padded_batches_stay(family: str, options: dict[str, Any], calls: Calls) -> None:
    model = make(family)
    if "output_attentions" in options:
        model.set_attn_implementation("eager")
    fast = optimised(model)
    given = padded() if "prompt_lookup_num_tokens" not in options else {"input_ids": prompt(1)}
    calls.ffns.clear()
    assert_same_text(fast, model, **given, **options)
    silent = "use_cache" in options or "output_attentions" in options
    assert bool(len(calls)) != silent or "prompt_lookup_num_tokens" in options


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
@pytest.mark.parametrize("implementation", [None, "static"])
def test_so_they_do_with_sliding_windows(
    family: str, implementation: str | None, calls: Calls
) -> None:
    model = make(family, sliding_window=5)
    fast = optimised(model)
    with calls.expected(LAYERS * 11):
        generated(fast, max_new_tokens=12, cache_implementation=implementation)
    assert_same_text(
        fast, model, **padded(), max_new_tokens=12, cache_implementation=implementation
    )


def test_so_they_do_with_an_assistant(calls: Calls) -> None:
    model, assistant = make(), make()
    fast, quick = optimised(model), optimised(assistant)
    calls.ffns.clear()
    ids, _ = generated(fast, input_ids=prompt(1), assistant_model=quick, max_new_tokens=12)
    expected, _ = generated(model, input_ids=prompt(1), max_new_tokens=12)
    assert torch.equal(ids, expected) and len(calls)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_the_digits_the_numbers_are_near(
    family: str, implementation: str, dtype: torch.dtype, calls: Calls
) -> None:
    """Also where the host computes the FFN, whose own linears take no other dtype."""
    model = make(family, head_dim=32).to(dtype)
    model.set_attn_implementation(implementation)
    fast = optimised(model)
    calls.ffns.clear()
    error = (stepped(fast) - stepped(model)).abs().max() / stepped(model).abs().max()
    assert len(calls) == LAYERS * 3
    assert error < {torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]


@pytest.mark.parametrize("linears", ["int8", "int4"])
def test_quantized_linears_compute_what_the_host_computes_with_them(
    linears: Any, calls: Calls
) -> None:
    fast = optimised(make(), linears=linears)
    hosts = copy.deepcopy(fast)
    for layer in layers_of(hosts):
        layer.self_attn.register_forward_hook(lambda *_: None)
    calls.ffns.clear()
    ours = stepped(fast)
    assert len(calls) == LAYERS * 3
    theirs = stepped(hosts)
    assert len(calls) == LAYERS * 3
    assert (ours - theirs).abs().max() <= 3e-2 * theirs.abs().max()  # x is rounded to int8


def test_what_comes_behind_a_cache_is_what_it_was(calls: Calls) -> None:
    """One token, several, fewer positions, other rows, more rows, and one token again."""
    model = make()
    fast = optimised(model)

    @torch.no_grad()
    def run(host: Any) -> list[Tensor]:
        cache, made = DynamicCache(), []

        def step(rows: int, tokens: int) -> None:
            given = prompt(rows, tokens)
            made.append(host(given, past_key_values=cache).logits)
            made.extend(layer.keys for layer in cache.layers)

        step(2, 7), step(2, 1), step(2, 1), step(2, 3), step(2, 1)
        cache.crop(-2)
        step(2, 1)
        cache.reorder_cache(torch.tensor([1, 0]))
        step(2, 1), step(2, 1)
        cache.batch_repeat_interleave(2)
        step(4, 1)
        cache.batch_select_indices(torch.tensor([0, 3]))
        step(2, 1), step(2, 2)
        return made

    calls.ffns.clear()
    ours = run(fast)
    assert len(calls) == LAYERS * 8
    for one, other in zip(ours, run(model), strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=1e-5)


def test_a_static_cache_is_read_with_its_mask(calls: Calls) -> None:
    model = make()
    fast = optimised(model)
    caches = [StaticCache(config=model.config, max_cache_len=20) for _ in range(2)]
    with calls.expected(LAYERS * 3):
        ours = stepped(fast, caches[0])
    torch.testing.assert_close(ours, stepped(model, caches[1]), atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("rows", [MOST_SEQUENCES, MOST_SEQUENCES + 1])
def test_more_sequences_are_the_hosts(rows: int, calls: Calls) -> None:
    model = make()
    fast = optimised(model)
    with calls.expected(LAYERS * 5 if rows <= MOST_SEQUENCES else 0):
        ids, logits = generated(fast, input_ids=prompt(rows))
    expected_ids, expected = generated(model, input_ids=prompt(rows))
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=1e-5)


def test_embeddings_and_positions_may_be_given(calls: Calls) -> None:
    model = make()
    fast = optimised(model)
    made = []
    for host in cast("list[Any]", [fast, model]):
        cache = DynamicCache()
        with torch.no_grad():
            host(prompt(), past_key_values=cache)
            embedded = host.get_input_embeddings()(prompt(2, 1))
            positions = torch.tensor([[3], [11]])
            calls.ffns.clear()
            given = {"past_key_values": cache, "position_ids": positions}
            made.append(host(inputs_embeds=embedded, **given).logits)
            assert len(calls) == (LAYERS if host is fast else 0)
    torch.testing.assert_close(*made, atol=TOLERANCE, rtol=1e-5)


def test_a_prompt_of_one_token_is_computed_too(calls: Calls) -> None:
    model = make()
    fast = optimised(model)
    with calls.expected(LAYERS * 6):  # generate makes the layers of its cache beforehand
        generated(fast, input_ids=prompt(2, 1))
    assert_same_text(fast, model, input_ids=prompt(2, 1))


def test_in_and_out_of_inference_mode_the_cache_goes_on(calls: Calls) -> None:
    model = make()
    made = []
    for host in cast("list[Any]", [optimised(model), model]):
        cache, logits = DynamicCache(), []
        calls.ffns.clear()
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
            with mode():
                for tokens in (7, 1, 1) if not logits else (1, 1):
                    given = prompt(2, tokens)
                    logits.append(host(given, past_key_values=cache).logits[:, -1].clone())
        made.append(torch.stack([one.clone() for one in logits]))
    torch.testing.assert_close(*made, atol=TOLERANCE, rtol=1e-5)


# --- hooks, replaced parts, changes ---------------------------------------------------------------

INNER = ("self_attn", "self_attn.q_proj", "self_attn.o_proj", "input_layernorm", "mlp")
INNER += ("mlp.act_fn", "mlp.down_proj", "post_attention_layernorm")


def parts(model: PreTrainedModel, path: str) -> list[nn.Module]:
    return [layer.get_submodule(path) for layer in cast("Any", model).model.layers]


def doubled(_: nn.Module, __: Any, y: Any) -> Any:
    return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y


@pytest.mark.parametrize("path", INNER)
@pytest.mark.parametrize("when", ["at once", "later"])
def test_hooks_fire_and_may_change_what_comes_out(path: str, when: str, calls: Calls) -> None:
    model = make()
    fast = optimised(model)
    if when == "later":
        stepped(fast)
    seen: list[Any] = []

    def watch(_: nn.Module, given: Any, y: Any) -> None:
        seen.append(y)

    for host in (fast, model):
        for part in parts(host, path):
            part.register_forward_hook(doubled)
    handles = [part.register_forward_hook(watch) for part in parts(fast, path)]
    with calls.expected(0):
        ours = stepped(fast)
    assert len(seen) == LAYERS * 4
    torch.testing.assert_close(ours, stepped(model), atol=TOLERANCE, rtol=1e-5)
    for handle in handles:
        handle.remove()


def test_hooks_that_are_gone_are_no_matter(calls: Calls) -> None:
    model = make()
    fast = optimised(model)
    handles = [part.register_forward_hook(doubled) for part in parts(fast, "input_layernorm")]
    with calls.expected(0):
        stepped(fast)
    for handle in handles:
        handle.remove()
    with calls.expected(LAYERS * 3):
        assert_same_steps(fast, model)


def test_hooks_of_the_layer_itself_keep_it_fused(calls: Calls) -> None:
    model = make()
    fast = optimised(model)
    for host in (fast, model):
        for layer in cast("Any", host).model.layers:
            layer.register_forward_hook(doubled)
    with calls.expected(LAYERS * 3):
        ours = stepped(fast)
    torch.testing.assert_close(ours, stepped(model), atol=TOLERANCE, rtol=1e-5)


def test_global_hooks_see_every_module(calls: Calls) -> None:
    fast = optimised(make())
    stepped(fast)
    seen: list[nn.Module] = []

    def watch(module: nn.Module, *_: Any) -> None:
        seen.append(module)

    handle = nn.modules.module.register_module_forward_hook(watch)
    try:
        with calls.expected(0):
            stepped(fast)
    finally:
        handle.remove()
    assert set(parts(fast, "self_attn.q_proj")) <= set(seen)


@pytest.mark.parametrize("path", INNER)
def test_a_part_that_was_replaced_is_honoured(path: str, calls: Calls) -> None:
    model = make()
    fast = optimised(model)
    stepped(fast)

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return doubled(self, None, self.inner(*args, **kwargs))

    for host in (fast, model):
        for layer in cast("Any", host).model.layers:
            layer.set_submodule(path, Doubled(layer.get_submodule(path)))
    with calls.expected(0):
        assert_same_steps(fast, model)


def test_a_forward_of_its_own_is_honoured(calls: Calls) -> None:
    """As accelerate sets it."""
    model = make()
    fast = optimised(model)
    for host in (fast, model):
        for part in cast("list[Any]", parts(host, "self_attn.o_proj")):
            before = part.forward
            part.forward = lambda x, before=before: 2 * before(x)
    with calls.expected(0):
        assert_same_steps(fast, model)


@pytest.mark.parametrize("way", ["in place", "another parameter", "data"])
def test_changes_of_norms_are_followed(way: str, calls: Calls) -> None:
    model = make("qwen3")
    fast = optimised(model)
    stepped(fast)
    for host in (fast, model):
        for path in ("input_layernorm", "self_attn.k_norm", "post_attention_layernorm"):
            for norm in cast("list[Any]", parts(host, path)):
                changed = norm.weight.detach() * 1.5
                if way == "in place":
                    norm.weight.detach().copy_(changed)
                elif way == "data":
                    norm.weight.data = changed
                else:
                    norm.weight = nn.Parameter(changed)
    with calls.expected(LAYERS * 3 if way == "in place" else 0):
        assert_same_steps(fast, model)


def test_another_attention_is_honoured(calls: Calls) -> None:
    """What somebody registers, and what a layer does not hand on."""

    def halved(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **given: Any) -> Any:
        return modeling_llama.eager_attention_forward(module, q / 2, k, v, *args, **given)

    model = make()
    fast = optimised(model)
    stepped(fast)
    ALL_ATTENTION_FUNCTIONS.register("halved", halved)
    try:
        for host in (fast, model):
            host.set_attn_implementation("halved")
        with calls.expected(0):
            assert_same_steps(fast, model)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("halved")


def test_states_and_attentions_are_the_hosts() -> None:
    model = make()
    model.set_attn_implementation("eager")
    fast = optimised(model)
    made = []
    for host in cast("list[Any]", [fast, model]):
        cache = DynamicCache()
        with torch.no_grad():
            host(prompt(), past_key_values=cache)
            made.append(
                host(
                    prompt(2, 1),
                    past_key_values=cache,
                    output_attentions=True,
                    output_hidden_states=True,
                )
            )
    for name in ("attentions", "hidden_states"):
        ours, theirs = (getattr(one, name) for one in made)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=1e-5)


# --- training, copies, casts, compile, threads ----------------------------------------------------


def test_training_and_gradients_are_what_they_were() -> None:
    fast = optimised(make())
    ids = prompt()
    embedded = fast.get_input_embeddings()(ids).detach()
    cache = DynamicCache()
    host = cast("Any", fast)
    host(ids, past_key_values=cache)
    one = embedded[:, :1].requires_grad_(True)
    with pytest.raises(ValueError, match="a packed linear has no gradients"):
        host(inputs_embeds=one, past_key_values=cache)
    with pytest.raises(ValueError, match="a packed linear has no gradients"):
        host(inputs_embeds=embedded.requires_grad_(True))
    fast.train()
    with torch.no_grad():
        assert host(ids, past_key_values=DynamicCache()).logits.isfinite().all()


def test_gradients_of_a_cache_are_not_dropped() -> None:
    """As those of a trained prefix."""
    host = cast("Any", optimised(make()))
    cache = DynamicCache()
    host(prompt(), past_key_values=cache)
    for layer in cache.layers:
        layer.keys = layer.keys.detach().clone().requires_grad_(True)
    with pytest.raises(ValueError, match="a packed linear has no gradients"):
        host(prompt(2, 1), past_key_values=cache)


def saved_and_loaded(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    made: PreTrainedModel = torch.load(file, weights_only=False)
    return made


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("linears", [None, "int8"])
def test_copies_stay_fused(family: str, way: str, linears: Any, calls: Calls) -> None:
    fast = optimised(make(family), linears=linears)
    copied = COPIES[way](fast)
    expected = stepped(fast)
    with calls.expected(LAYERS * 3):
        assert torch.equal(stepped(copied), expected)
    with calls.expected(LAYERS * 3):
        assert torch.equal(stepped(COPIES[way](copied)), expected)
    assert [type(layer) for layer in layers_of(copied)] == [type(one) for one in layers_of(fast)]


def test_a_copy_has_norms_of_its_own(calls: Calls) -> None:
    fast = optimised(make())
    expected = stepped(fast)
    copied = copy.deepcopy(fast)
    for norm in cast("list[Any]", parts(copied, "input_layernorm")):
        norm.weight.mul_(2)
    assert torch.equal(stepped(fast), expected)
    assert not torch.equal(stepped(copied), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_a_folder_is_what_it_was_bit_by_bit(family: str, tmp_path: Path, calls: Calls) -> None:
    save(make(family), tmp_path / "before")
    fast = load(tmp_path / "before", optimize=True)
    with calls.expected(LAYERS * 3):
        stepped(fast)
    save(fast, tmp_path / "after")
    names = sorted(file.name for file in (tmp_path / "before").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


@pytest.mark.parametrize("first", [True, False])
def test_a_cast_is_followed(first: bool, calls: Calls) -> None:
    """Before the first token, and behind it."""
    model = make(head_dim=32)
    fast = optimised(model)
    if first:
        stepped(fast)
    fast.to(torch.bfloat16)
    calls.ffns.clear()
    logits, expected = stepped(fast), stepped(model)
    assert len(calls) == LAYERS * 3
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_it_is_one_graph_and_the_same(family: str, calls: Calls) -> None:
    fast = optimised(make(family))
    cache = StaticCache(config=fast.config, max_cache_len=20)
    expected = stepped(fast, cache)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with calls.expected(0):
        again = stepped(compiled, StaticCache(config=fast.config, max_cache_len=20))
    torch.testing.assert_close(again, expected, atol=TOLERANCE, rtol=1e-5)
    torch._dynamo.reset()


def test_two_models_in_two_threads() -> None:
    models = [optimised(make()), optimised(make("gemma3"))]
    expected = [stepped(copy.deepcopy(model), steps=8) for model in models]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(5):
            if not torch.equal(stepped(models[which], steps=8), expected[which]):
                wrong.append(which)

    team = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert not wrong
