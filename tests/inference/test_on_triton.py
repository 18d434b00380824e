"""Models that are optimised for the Triton kernels, interpreted: same numbers, few launches."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel, StaticCache

from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.experts.swapped import swap_activations
from moe_tools.inference import optimized
from moe_tools.inference.optimized import optimize
from moe_tools.kernels import sparse_ffn as kernels
from moe_tools.kernels.quantize import INT4
from tests.families import FAMILIES, build, logits, of_size
from tests.host_reads import NoHostReads

pytest.importorskip("triton")

from moe_tools.kernels.triton.kernel_launch import KernelLaunch

pytestmark = pytest.mark.either
LOW = {"kind": "threshold", "tau": 0.01}
OF_ONE_FFN = ["list_routed", "compute_hidden", "combine"]


def make(family: str = "llama", **conversion: Any) -> PreTrainedModel:
    """A routed model, another half of the experts off for every token."""
    model = build(family)
    attach_experts(model, replace(of_size(4), **conversion))
    for ffn in expert_ffns(model):
        for weight in ffn.router.parameters():
            nn.init.normal_(weight)
    return model


def optimised(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    return optimize(copy.deepcopy(model), backend="triton", **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("router", ["sigmoid", "few_bits"])
def test_on_a_gpu_nobody_has_to_ask(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are taken for those of a GPU; one token runs on the kernels, more by products."""
    for module in (kernels, optimized):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    model = make(router=router, expert_size=1 if router == "few_bits" else 4, selector=LOW)
    fast = optimize(copy.deepcopy(model))
    assert {ffn.packed.backend for ffn in expert_ffns(fast) if ffn.packed} == {"triton"}
    for tokens, runs in ((1, True), (5, False)):
        ids = torch.randint(3, 64, (1, tokens))
        with launches(monkeypatch) as seen, torch.no_grad():
            ours = fast(ids).logits
        assert bool(seen) == runs
        with torch.no_grad():
            torch.testing.assert_close(ours, model(ids).logits, atol=1e-4, rtol=1e-4)


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[KernelLaunch]]:
    """Lists what runs."""
    seen: list[KernelLaunch] = []
    run = KernelLaunch.run

    def recorded(launch: KernelLaunch) -> None:
        seen.append(launch)
        run(launch)

    with monkeypatch.context() as patch:
        patch.setattr(KernelLaunch, "run", recorded)
        yield seen


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_stay(family: str) -> None:
    model = make(family)
    fast = optimised(model)
    assert {ffn.packed.backend for ffn in expert_ffns(fast) if ffn.packed} == {"triton"}
    torch.testing.assert_close(logits(fast), logits(model), atol=2e-5, rtol=1e-5)


def test_a_token_of_a_routed_ffn_is_three_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router, the threshold and the list are the first, the residual is added in the last."""
    model = make()
    fast = optimised(model)
    with launches(monkeypatch) as seen, torch.no_grad():
        ours = fast(torch.tensor([[5]])).logits
    assert [one.name for one in seen] == OF_ONE_FFN * len(expert_ffns(model))
    assert all(one.arguments["residual"] is not None for one in seen if one.name == "combine")
    torch.testing.assert_close(ours, model(torch.tensor([[5]])).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("router", "first"),
    [
        ("sigmoid", "list_routed"),
        ("mlp", "list_routed"),
        ("low_rank", "list_routed"),
        ("bottleneck", "list_routed"),
        ("few_bits", "list_proposed"),
        ("norm", "list_experts"),
    ],
)
def test_every_kind_of_router(router: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_neurons = router in ("low_rank", "bottleneck", "few_bits")
    selector = LOW if router == "few_bits" else {"kind": "threshold", "tau": 0.4}
    model = make(router=router, expert_size=1 if of_neurons else 4, selector=selector)
    with launches(monkeypatch) as seen:
        fast = logits(optimised(model))
    counted = Counter(one.name for one in seen)
    assert counted == dict.fromkeys((first, "compute_hidden", "combine"), len(expert_ffns(model)))
    torch.testing.assert_close(fast, logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "fatrelu", "drelu"])
def test_a_dense_model_stops_at_its_gate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"kind": kind} | ({"theta": 0.05} if kind == "fatrelu" else {})
    model = build("llama")
    swap_activations(model, Conversion("donor", activation=spec))
    with launches(monkeypatch) as seen:
        fast = logits(optimised(model))
    assert [one.name for one in seen[:3]] == ["list_firing", "compute_hidden", "combine"]
    torch.testing.assert_close(fast, logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8, INT4], ids=str)
@pytest.mark.parametrize("shared", [0, 2])
def test_what_is_off_may_add_its_mean(dtype: torch.dtype | None, shared: int) -> None:
    model = make(when_off="mean", shared_experts=shared)
    for ffn in expert_ffns(model):
        assert ffn.off_F is not None
        ffn.off_F.normal_()
    exact = optimize(copy.deepcopy(model), backend="reference", dtype=dtype)
    fast, expected = logits(optimised(model, dtype=dtype)), logits(exact)
    rounds = dtype in (torch.int8, INT4)  # the reference rounds x, too, as a CPU does
    torch.testing.assert_close(fast, expected, atol=0.05 if rounds else 2e-5, rtol=1e-5)


def test_who_looks_at_routing_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    fast, ids = optimised(model), torch.randint(3, 64, (2, 5))
    with launches(monkeypatch) as seen, record_routing(fast) as ours, torch.no_grad():
        fast(ids)
    assert {one.name for one in seen} == {"list_experts", "compute_hidden", "combine"}
    with record_routing(model) as theirs, torch.no_grad():
        model(ids)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.mask_TE, other.mask_TE)


def test_who_hears_an_ffn_hears_its_own_output() -> None:
    model = make()
    fast, heard = optimised(model), []
    for one in (model, fast):
        one.model.layers[0].mlp.register_forward_hook(lambda _, args, y: heard.append(y))
        logits(one)
    torch.testing.assert_close(heard[1], heard[0], atol=2e-5, rtol=1e-5)


def test_so_does_who_hears_every_module() -> None:
    model = make()
    fast, heard = optimised(model), []

    def hear(module: nn.Module, _: Any, y_TD: Any) -> None:
        if type(module).__name__ == "ExpertFFN":
            heard.append(y_TD)

    for one in (model, fast):
        handle = nn.modules.module.register_module_forward_hook(hear)
        logits(one)
        handle.remove()
    half = len(heard) // 2
    for ours, theirs in zip(heard[half:], heard[:half], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_a_gradient_is_refused() -> None:
    model = make()
    embedded = model.get_input_embeddings()(torch.tensor([[5, 6]])).detach().requires_grad_()
    with pytest.raises(ValueError, match="a packed FFN has no gradients"):
        optimised(model)(inputs_embeds=embedded)


def test_a_copy_and_a_pickle_compute_the_same() -> None:
    fast = optimised(make())
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(logits(other), logits(fast), atol=0, rtol=0)


@pytest.mark.parametrize("router", ["sigmoid", "few_bits"])
def test_generate_with_a_static_cache_is_one_graph_a_token(router: str) -> None:
    """`fullgraph` fails at a graph break, and so at a number that the host reads."""
    model = make(router=router, expert_size=1 if router == "few_bits" else 4, selector=LOW)
    ids = torch.randint(3, 64, (1, 6))
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **options)
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None, dynamic=False)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    text = optimised(model).generate(
        ids, cache_implementation="static", compile_config=compiled, **options
    )
    assert torch.equal(text, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("router", ["sigmoid", "bottleneck", "low_rank", "few_bits", "norm"])
def test_the_host_reads_nothing(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the operators; inside them, launches are made of shapes."""
    model = make(router=router, expert_size=1 if router == "few_bits" else 4, selector=LOW)
    fast, cache = optimised(model), StaticCache(config=model.config, max_cache_len=8)
    monkeypatch.setattr(KernelLaunch, "run", lambda launch: None)
    with NoHostReads(), torch.no_grad():
        fast(torch.tensor([[7]]), past_key_values=cache)


def test_one_step_is_one_graph() -> None:
    model = make()
    fast, ids = optimised(model), torch.tensor([[7]])
    cache = StaticCache(config=model.config, max_cache_len=8)
    step = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        ours = step(ids, past_key_values=cache).logits
        expected = model(ids).logits
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
