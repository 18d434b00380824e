"""Experts of every host class in the installed transformers, against the host's own loop."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DbrxConfig, JetMoeConfig, JetMoeForCausalLM, MixtralConfig

from moe_tools.hosts.ffn import find_ffns, host_state_dict, permute_neurons
from moe_tools.hosts.fused import check_fused
from moe_tools.hosts.moe_host import HostExperts, unfuse_experts

EXPERTS, WIDTH, NEURONS, TOKENS = 4, 16, 24, 33
SIZES = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size", "ffn_dim"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"), NEURONS
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    ),
    **dict.fromkeys(("hidden_act", "hidden_activation", "hidden_activation_fn"), "silu"),
    "mlp_hidden_act": "relu2",
    "zero_expert_num": 2,
    "n_shared_experts": EXPERTS,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
    "mlp_gate_softcap": 7.0,
    "mlp_up_softcap": 7.0,
    "moe_latent_size": None,
    "_experts_implementation": "eager",
}
"""What experts ask of a config, under the names of all families."""
NORMED = ("MuseSparkExperts",)
"""With a norm after each expert: refused."""


def flagged_classes() -> list[tuple[str, str]]:
    """(module, class) of all that `use_experts_implementation` decorates; imports none of them."""
    found = []
    root = Path(transformers.__file__).parent / "models"
    for file in sorted(root.glob("*/modeling_*.py")):
        lines = file.read_text().splitlines()
        for above, line in pairwise(lines):
            if above.startswith("@use_experts_implementation") and line.startswith("class "):
                name = line.removeprefix("class ").partition("(")[0]
                found.append((f"transformers.models.{file.parent.name}.{file.stem}", name))
    return found


FLAGGED = flagged_classes()
READ = [pytest.param(*one, id=one[1]) for one in FLAGGED if one[1] not in NORMED]


def tiny(module: str, name: str, **sizes: Any) -> nn.Module:
    """A model that holds experts of a class, every number of them random."""
    config = SimpleNamespace(**SIZES | sizes)
    began_later = "this transformers has no such family yet"
    experts = getattr(pytest.importorskip(module, reason=began_later), name)(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
    return nn.ModuleDict({"experts": experts})


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """x_TD large enough for limits of 7, chosen_TK and weight_TK."""
    x_TD = 5 * torch.randn(TOKENS, WIDTH)
    return x_TD, torch.rand(TOKENS, EXPERTS).argsort(-1)[:, :2], torch.rand(TOKENS, 2)


def apart(model: nn.Module) -> HostExperts:
    """The same experts, taken apart in place."""
    unfuse_experts(model)
    experts = model["experts"]
    assert isinstance(experts, HostExperts)
    return experts


def test_transformers_has_the_classes_that_we_look_for() -> None:
    assert len(FLAGGED) >= 30  # of 5.7; 65 of 5.23
    assert {"GptOssExperts", "NemotronHExperts", "MixtralExperts"} <= {name for _, name in FLAGGED}


@pytest.mark.parametrize(("module", "name"), READ)
@torch.no_grad()
def test_experts_of_every_class_compute_what_the_host_does(module: str, name: str) -> None:
    model, inputs = tiny(module, name), tokens()
    expected_TD = model["experts"](*inputs)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    experts = apart(model)
    assert torch.equal(experts(*inputs), expected_TD)
    state = host_state_dict(model)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(("module", "name"), READ)
def test_the_order_of_gate_and_up_is_read_off_a_gate_without_its_flag(
    module: str, name: str
) -> None:
    experts = tiny(module, name)["experts"]
    said = check_fused("experts", experts)
    experts.__dict__.pop("is_concatenated", None)
    assert check_fused("experts", experts) == said


INKLING = "transformers.models.inkling.modeling_inkling"
LLAMA4 = "transformers.models.llama4.modeling_llama4"
LONGCAT = "transformers.models.longcat_flash.modeling_longcat_flash"
STEP = "transformers.models.step3p7.modeling_step3p7"
UNFLAGGED = [
    pytest.param(LONGCAT, "LongcatFlashExperts", id="identity experts"),
    pytest.param(LLAMA4, "Llama4TextExperts", id="every expert on every token"),
    pytest.param(INKLING, "InklingSharedExperts", id="shared experts"),
    pytest.param(STEP, "Step3p7Experts", id="limits"),
]


def arguments(name: str) -> tuple[Tensor, ...]:
    """What the host calls the experts of a class with."""
    x_TD, chosen_TK, weight_TK = tokens()
    if name == "Llama4TextExperts":  # as its host does: 0 where an expert was not chosen
        given_TX = torch.zeros(TOKENS, EXPERTS).scatter(1, chosen_TK, weight_TK)
        return ((given_TX.T[..., None] * x_TD).flatten(0, 1),)
    if name == "InklingSharedExperts":
        return x_TD.view(3, -1, WIDTH), torch.rand(3, TOKENS // 3, EXPERTS)
    if name == "LongcatFlashExperts":
        return x_TD, torch.rand(TOKENS, EXPERTS + 2).argsort(-1)[:, :3], torch.rand(TOKENS, 3)
    return x_TD, chosen_TK, weight_TK


@pytest.mark.parametrize(("module", "name"), UNFLAGGED)
@torch.no_grad()
def test_experts_without_flags_compute_what_the_host_does(module: str, name: str) -> None:
    model, inputs = tiny(module, name), arguments(name)
    expected_TD = model["experts"](*inputs)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    experts = apart(model)
    y_TD = experts(*inputs)
    assert y_TD.shape == expected_TD.shape
    assert (y_TD - expected_TD).abs().max() <= 1e-6 * expected_TD.abs().max()
    state = host_state_dict(model)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
    experts.split_from(state, "experts")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(("module", "name"), [*READ, *UNFLAGGED])
@torch.no_grad()
def test_what_is_written_to_an_expert_is_written_to_the_host(module: str, name: str) -> None:
    """Neurons of all experts reordered, in the views: the host's own forward pass is the same."""
    model, inputs = tiny(module, name), arguments(name)
    expected_TD = model["experts"](*inputs)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for ffn in find_ffns(model):
        permute_neurons(ffn, torch.randperm(NEURONS))
    y_TD = model["experts"](*inputs)
    assert (y_TD - expected_TD).abs().max() <= 2e-6 * expected_TD.abs().max()
    assert all(
        not torch.equal(before[key], now)
        for key, now in model.state_dict().items()
        if not key.endswith("down_proj_bias")
    )


OWN = [
    one
    for one in [*READ, *UNFLAGGED]
    if one.values[1] in ("GptOssExperts", "Inkling2Experts", "Step3p7Experts", "BeamExperts")
]


@pytest.mark.parametrize(("module", "name"), OWN)
@torch.no_grad()
def test_an_own_gate_is_copied_and_pickled_without_the_weights(module: str, name: str) -> None:
    model, inputs = tiny(module, name), tokens()
    experts = apart(model)
    expected_TD = experts(*inputs)
    twin = copy.deepcopy(experts)
    for parameter in experts.parameters():
        parameter.zero_()
    assert torch.equal(twin(*inputs), expected_TD)
    assert not experts(*inputs).any()
    gate = twin[0].activation_fn
    assert all(expert.activation_fn is gate for expert in twin)
    assert not list(gate.parameters())
    stored = pickle.dumps(gate)
    assert len(stored) < 8000
    x_TF = torch.randn(3, 2 * NEURONS)
    assert torch.equal(
        pickle.loads(stored).join_TF(*x_TF.chunk(2, -1)), gate.join_TF(*x_TF.chunk(2, -1))
    )


def test_a_norm_after_each_expert_is_refused() -> None:
    """And experts of a layout that nobody knows: the model would go on with them as they are."""
    for module, name in FLAGGED:
        if name in NORMED:
            model = tiny(module, name, post_norm_eps=1e-6)
            with pytest.raises(ValueError, match=r"^experts: .*a norm after each expert, which"):
                find_ffns(model)


class OddExperts(nn.Module):
    """Three dimensions, other names."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(EXPERTS, NEURONS, WIDTH))


class Mixed(nn.Module):
    """No word of experts, two tensors of as many parts as the config has experts."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(EXPERTS, NEURONS, WIDTH))
        self.out = nn.Parameter(torch.randn(EXPERTS, WIDTH, NEURONS))


@pytest.mark.parametrize("kind", [OddExperts, Mixed])
def test_experts_that_nobody_knows_are_an_error(kind: type[nn.Module]) -> None:
    model = nn.ModuleDict({"layer": kind()})
    model.config = MixtralConfig(num_local_experts=EXPERTS)
    with pytest.raises(ValueError, match=rf"^layer: experts of class {kind.__name__} cannot"):
        find_ffns(model)


JETMOE = JetMoeConfig(
    vocab_size=8, hidden_size=8, num_hidden_layers=1, num_key_value_heads=1, kv_channels=8
)
DBRX = DbrxConfig(
    d_model=16,
    n_heads=2,
    n_layers=1,
    vocab_size=8,
    ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4},
    attn_config={"kv_n_heads": 1, "rope_theta": 10000.0},
)


def test_experts_that_cannot_be_taken_apart_are_named() -> None:
    with pytest.raises(ValueError, match="experts of class JetMoeParallelExperts cannot be taken"):
        find_ffns(JetMoeForCausalLM(JETMOE))


@pytest.mark.parametrize("kind", [Mixed, lambda: nn.Conv1d(EXPERTS, 4, 3)])
def test_a_matrix_for_each_head_is_no_expert(kind: Callable[[], nn.Module]) -> None:
    model = nn.ModuleDict({"layer": kind()})
    model.config = MixtralConfig(num_local_experts=EXPERTS + 1)
    with pytest.raises(ValueError, match="has no FFN that moe-tools can find"):
        find_ffns(model)


class WrongLimits(nn.Module):
    """Shapes of an FFN, no flags, and a forward pass that does more."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * NEURONS, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, NEURONS))
        self.act_fn = nn.SiLU()

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for index in range(EXPERTS):
            token, place = torch.where(chosen_TK == index)
            gate_TF, up_TF = (x_TD[token] @ self.gate_up_proj[index].T).chunk(2, -1)
            h_TF = self.act_fn(gate_TF).clamp(max=7) * up_TF
            y_TD[token] += h_TF @ self.down_proj[index].T * weight_TK[token, place, None]
        return y_TD


def test_shapes_alone_are_not_believed() -> None:
    model = nn.ModuleDict({"experts": WrongLimits()})
    before = model["experts"]
    with pytest.raises(ValueError, match=r"^experts: WrongLimits computes something else than"):
        unfuse_experts(model)
    assert model["experts"] is before
