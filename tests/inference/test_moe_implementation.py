"""`experts_implementation="moe_tools"`: MoE hosts through our kernels, beside the eager path."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.experts.conversion import Conversion
from moe_tools.experts.swapped import swap_activations
from moe_tools.hosts import moe_kernels
from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.hosts.moe_host import HostExperts, fused_experts
from moe_tools.hosts.moe_kernels import as_one
from moe_tools.inference.moe_implementation import lay_out_experts, register_experts
from moe_tools.kernels import moe as kernels
from moe_tools.kernels.sparse_ffn import triton_kernels
from tests.families import FAMILIES, MOE, build, logits, model_inputs

pytest.importorskip("triton")

pytestmark = pytest.mark.either
every_moe = pytest.mark.parametrize("family", MOE)
ACTIVATIONS: dict[str, dict[str, Any] | None] = {
    "silu": None,
    "relu": {"kind": "relu"},
    "drelu": {"kind": "drelu"},
    "fatrelu": {"kind": "fatrelu", "theta": 0.05},
}


@pytest.fixture(params=["triton", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What a GPU takes by itself, interpreted; and what a CPU takes."""
    calls: list[str] = []

    def run(*operands: Any) -> Tensor:
        calls.append(request.param)
        return kernels.moe_ffn(*operands, backend=request.param)

    monkeypatch.setattr(moe_kernels, "moe_ffn", run)
    register_experts()
    yield request.param
    assert calls, "no test here may pass by the eager path"


def with_activation(model: PreTrainedModel, name: str) -> PreTrainedModel:
    spec = ACTIVATIONS[name]
    if spec is not None:
        swap_activations(model, Conversion("donor", activation=spec))
    return model


def through_kernels(model: PreTrainedModel) -> PreTrainedModel:
    ours = copy.deepcopy(model)
    ours.set_experts_implementation("moe_tools")
    return ours


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """By the names of the model's own parameters."""
    model.zero_grad()
    model(**model_inputs(model)).logits.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_moe
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_logits_and_gradients_equal_eager(family: str, activation: str, backend: str) -> None:
    model = with_activation(build(family), activation)
    ours = through_kernels(model)
    theirs = logits(model)
    largest = theirs.abs().max().item()
    torch.testing.assert_close(logits(ours), theirs, rtol=1e-5, atol=1e-5 * largest)
    found = gradients(ours)
    for name, expected in gradients(model).items():
        # eager gives an expert without tokens no gradient, we give it zeros
        largest = expected.abs().max().item()
        torch.testing.assert_close(
            found.pop(name),
            expected,
            rtol=1e-4,
            atol=1e-5 * largest,
            msg=lambda text, n=name: f"{n}: {text}",
        )
    assert not any(extra.any() for extra in found.values())


@pytest.mark.parametrize("activation", ["silu", "drelu"])
def test_many_tokens_are_grouped(activation: str, backend: str) -> None:
    model = with_activation(build("mixtral"), activation)
    ours, ids = through_kernels(model), torch.randint(3, 64, (3, 30))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["silu", "drelu"])
def test_generate_gives_the_same_tokens(activation: str, backend: str) -> None:
    model = with_activation(build("mixtral"), activation)
    ours = through_kernels(model)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = torch.randint(3, 64, (1, 4))
    assert torch.equal(ours.generate(ids, **options), model.generate(ids, **options))


@every_moe
def test_a_stock_model_is_loaded_with_it(family: str, backend: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "donor")
    loaded = FAMILIES[family].model.from_pretrained(
        tmp_path / "donor", experts_implementation="moe_tools"
    )
    assert fused_experts(loaded)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_an_expert_without_tokens_changes_nothing(activation: str, backend: str) -> None:
    model = with_activation(build("mixtral"), activation)
    for module in model.modules():
        if type(module).__name__ == "MixtralTopKRouter":  # of four experts, nobody takes two
            module.register_forward_hook(first_two)
    ours = through_kernels(model)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)


def first_two(module: nn.Module, args: Any, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scores, weights, chosen = made
    return scores, weights, torch.arange(2).expand_as(chosen)


@pytest.mark.parametrize("activation", ["silu", "drelu"])
def test_laid_out_weights_are_read_as_they_are(activation: str, backend: str) -> None:
    model = with_activation(build("mixtral"), activation)
    ours = through_kernels(model)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    lay_out_experts(ours)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.shape == before[name].shape
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)
    for module in [*fused_experts(ours).values(), *hosts(ours)]:
        with torch.no_grad():
            down_XDF = (
                as_one([expert.down_proj.weight for expert in module])
                if isinstance(module, HostExperts)
                else module.get_parameter("down_proj")
            )
        assert down_XDF.transpose(1, 2).is_contiguous()
        assert down_XDF.untyped_storage().data_ptr() in storages(ours)  # no copy


def hosts(model: PreTrainedModel) -> list[HostExperts]:
    return [module for module in model.modules() if isinstance(module, HostExperts)]


def storages(model: PreTrainedModel) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def test_experts_that_differ_run_one_by_one() -> None:
    register_experts()
    model = build("mixtral")
    names = [ffn.name for ffn in unfused_ffns(model)]
    each = {n: {"kind": "fatrelu", "theta": 0.01 * i} for i, n in enumerate(names)}
    swap_activations(model, Conversion("d", activation={"kind": "fatrelu"}, activation_of=each))
    assert torch.equal(logits(through_kernels(model)), logits(model))


def test_what_watches_an_expert_sees_it() -> None:
    register_experts()
    model = build("mixtral")
    unfused_ffns(model)
    ours, seen = through_kernels(model), []
    hosts(ours)[0][0].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)
    assert seen


def test_experts_that_we_cannot_read_are_named() -> None:
    register_experts()
    model = build("mixtral")
    model.set_experts_implementation("moe_tools")
    module = next(iter(fused_experts(model).values()))
    module.has_post_expert_norm = True
    for run in (lay_out_experts, logits):
        with pytest.raises(
            ValueError, match=r"of class MixtralExperts cannot .* a norm after each"
        ):
            run(model)


def test_the_backend_is_checked() -> None:
    assert get_args(kernels.Backend) == ("auto", "triton", "reference")
    experts = kernels.ExpertWeights(*(torch.zeros(2, 3, 4) for _ in range(3)), "silu")
    chosen_TK = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^unknown backend 'cuda'; known: auto, triton, refer"):
        kernels.moe_ffn(experts, torch.zeros(1, 4), chosen_TK, torch.ones(1, 1), backend="cuda")
    with pytest.raises(ValueError, match=r"^x_TD is \(1, 5\); the experts have width 4"):
        kernels.moe_ffn(experts, torch.zeros(1, 5), chosen_TK, torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"weight_TK \(1, 2\), for 1 tokens: one row a token"):
        kernels.moe_ffn(experts, torch.zeros(1, 4), chosen_TK, torch.ones(1, 2))
    with pytest.raises(ValueError, match="all are"):
        kernels.ExpertWeights(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(3, 4), "relu")


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["fused", "drelu"])
def test_a_step_is_one_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fullgraph` fails at a graph break, and so at a number that the host reads."""
    monkeypatch.setattr(kernels, "on_gpu", lambda tensor: True)
    triton_kernels("moe")  # as `register_experts` does where a card is
    register_experts()
    model = build("mixtral")
    if kind == "drelu":
        swap_activations(model, Conversion("donor", activation={"kind": "drelu"}))
    ids = torch.tensor([[7]])
    with torch.no_grad():
        expected = model(ids).logits
        model.set_experts_implementation("moe_tools")
        lay_out_experts(model)
        step = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(step(ids).logits, expected, rtol=1e-4, atol=1e-4)
