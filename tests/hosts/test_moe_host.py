"""The experts of an MoE host, taken apart: what each of them sees, and what its weights get."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moe_tools.experts.conversion import Conversion, attach_experts, set_mode
from moe_tools.experts.experts import Mode, expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.experts.swapped import swap_activations
from moe_tools.hosts.ffn import host_state_dict, unfused_ffns
from moe_tools.hosts.moe_host import HostExperts, chosen_share
from moe_tools.inference.moe_implementation import lay_out_experts, register_experts
from moe_tools.measure.evaluate import evaluate
from moe_tools.training.checkpointing import NAME
from tests.families import (
    EXPERT_SIZE,
    FUSED,
    MOE,
    UNFLAGGED,
    build,
    logits,
    model_inputs,
    randomize,
    same,
)

every_moe = pytest.mark.parametrize("family", [*MOE, *FUSED])
ROUTERS = (
    "sigmoid",
    "bottleneck",
    "softmax",
    "mlp",
    "low_rank",
    "norm",
    "similarity",
    "representative",
    "mean_gate",
)
ROUTERS += ("sign", "int8_gate", "oracle")
TOP_K = {"kind": "topk", "k": 2}


def apart(family: str = "mixtral", **config: Any) -> nn.Module:
    """A model whose experts are taken apart."""
    model = build(family, **config)
    unfused_ffns(model)
    return model


def experts_of(model: nn.Module) -> HostExperts:
    return next(module for module in model.modules() if isinstance(module, HostExperts))


def tokens(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """x_TD, chosen_TK and weight_TK: of four experts the first and the last get no token."""
    x_TD = torch.randn(count, 16)
    chosen_TK = torch.tensor([[1, 2], [2, 1]]).repeat(count, 1)[:count]
    return x_TD, chosen_TK, torch.rand(count, 2)


def by_hand(experts: HostExperts, x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Token by token."""
    rows = []
    for x_D, chosen_K, weight_K in zip(x_TD, chosen_TK, weight_TK, strict=True):
        outputs = [experts[int(index)](x_D[None])[0] for index in chosen_K]
        rows.append(sum(w * y_D for w, y_D in zip(weight_K, outputs, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("count", [0, 1, 2, 33])
def test_every_token_gets_the_sum_of_the_experts_chosen_for_it(count: int) -> None:
    experts = experts_of(apart())
    x_TD, _, weight_TK = tokens(count)
    chosen_TK = torch.rand(count, 4).argsort(-1)[:, :2]
    y_TD = experts(x_TD, chosen_TK, weight_TK)
    assert y_TD.shape == x_TD.shape
    if count:
        expected_TD = by_hand(experts, x_TD, chosen_TK, weight_TK)
        assert (y_TD - expected_TD).abs().max() < 1e-6


def test_an_expert_without_a_token_changes_no_output() -> None:
    """Bit by bit, whether gradients are wanted or not, and also where weights are infinite."""
    experts = experts_of(apart())
    with torch.no_grad():
        plain_TD = experts(*(inputs := tokens()))
        experts[0].down_proj.weight.fill_(torch.inf)
        experts[3].gate_up_proj.weight.fill_(torch.nan)
    assert torch.equal(experts(*inputs), plain_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_without_a_token_takes_part_in_the_graph(dtype: torch.dtype) -> None:
    """A parameter without a gradient makes DistributedDataParallel wait for it for ever."""
    experts = experts_of(apart().to(dtype))
    x_TD, chosen_TK, weight_TK = tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        experts(x_TD.to(dtype), chosen_TK, weight_TK.to(dtype)).float().sum().backward()
    for index, expert in enumerate(experts):
        for param in expert.parameters():
            assert param.grad is not None and param.grad.dtype == dtype
            assert bool(param.grad.any()) == (index in (1, 2))


def test_only_gradients_make_an_expert_run_for_nothing() -> None:
    experts = experts_of(apart())
    ran: list[int] = []
    for index, expert in enumerate(experts):
        expert.register_forward_hook(lambda _, __, y_TD, index=index: ran.append(index))
    with torch.no_grad():
        experts(*tokens())
    assert ran == [1, 2]
    experts(*tokens())
    assert ran == [1, 2, 0, 1, 2, 3]  # in the same order in every process, as ZeRO-3 needs it


@pytest.mark.parametrize("mode", ["soft", "straight", "hard"])
@pytest.mark.parametrize("router", ROUTERS)
def test_our_experts_inside_one_of_the_host_s_take_part(router: str, mode: Mode) -> None:
    """Their routers too: every parameter of an expert that saw no token has a gradient of zero."""
    model = build("mixtral")
    attach_experts(model, Conversion("donor", EXPERT_SIZE, router, TOP_K))
    set_mode(model, mode)
    experts = experts_of(model)
    for ffn in expert_ffns(model):
        for param in ffn.router.parameters():
            param.requires_grad_(mode != "hard")
    with record_routing(model) as routings:
        y_TD = experts(*tokens())
    y_TD.sum().backward()
    assert [routing.tokens for routing in routings] == [0, 5, 5, 0]
    for index, expert in enumerate(experts):
        for name, param in expert.named_parameters():
            if param.requires_grad:
                assert param.grad is not None, name
                assert torch.isfinite(param.grad).all(), name
                assert index in (1, 2) or not param.grad.any(), name


@every_moe
def test_taken_apart_or_fused_every_expert_gets_a_gradient(family: str) -> None:
    """The host's own fused parameters have one for every expert; so have ours, the same."""
    # LongCat's own loop fails where a token chooses one expert
    chooses = {"moe_topk": 2} if family == "longcat" else {"num_experts_per_tok": 1}
    torch.manual_seed(0)
    fused = build(family, **chooses).train()
    torch.manual_seed(0)
    separate = build(family, **chooses).train()
    unfused_ffns(separate)
    grads = []
    for model in (fused, separate):
        inputs = {name: ids[:1, :3] for name, ids in model_inputs(model).items()}
        model(**inputs).logits.square().mean().backward()
        shadow = copy.deepcopy(model)
        for mine, param in zip(shadow.parameters(), model.parameters(), strict=True):
            assert param.grad is not None or not param.requires_grad
            mine.data = torch.zeros_like(mine) if param.grad is None else param.grad
        grads.append(host_state_dict(shadow))
    for name, whole_XFD in grads[0].items():
        if ".experts." in name:
            assert (grads[1][name] - whole_XFD).abs().max() < 1e-6, name
            assert any(not part_FD.any() for part_FD in grads[1][name])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_is_computed_again_gives_its_idle_experts_their_zeros(
    checkpointing: bool,
) -> None:
    model = apart(num_local_experts=8, num_experts_per_tok=1).train()
    randomize(model)
    if checkpointing:
        getattr(model, f"{NAME}_enable")({"use_reentrant": False})
    inputs = {name: ids[:1, :3] for name, ids in model_inputs(model).items()}
    model(**inputs).logits.sum().backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("family", FUSED)
def test_what_a_kernel_cannot_compute_runs_as_without_it(family: str) -> None:
    """`experts_implementation="moe_tools"`, fused and taken apart, with gradients."""
    register_experts()
    model = build(family)
    expected = logits(model)
    if family not in UNFLAGGED:
        model.set_experts_implementation("moe_tools")
    lay_out_experts(model)
    fused = model(**model_inputs(model)).logits
    assert same(family, fused, expected)
    fused.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".experts." in name)
    unfused_ffns(model)
    lay_out_experts(model)
    assert same(family, logits(model), expected)


@pytest.mark.parametrize("family", FUSED)
def test_both_levels_of_every_kind_of_experts_are_counted(family: str) -> None:
    model = build(family)
    tokens_BT = torch.randint(3, 64, (4, 16))
    seen = evaluate(model, tokens_BT)
    layers = seen.moe_layers.values()
    # of a token 2 of 4 run; of LongCat's 6 some of the 3 chosen ones compute nothing; in Inkling
    # two shared ones run as well, in Nemotron-H and Llama 4 one
    two, one = (1 / 3, 1 / 3), (0.4, 0.4)
    shared = {"longcat": (0.3, 0.7), "inkling": two, "nemotron_h": one, "llama4": one}
    least, most = shared.get(family, (0.5, 0.5))
    assert len(layers) == 2
    assert all(least - 1e-9 <= layer.experts <= most + 1e-9 for layer in layers)


def test_a_token_chooses_as_many_experts_as_the_config_says() -> None:
    assert chosen_share(build("gpt_oss"), "model.layers.0.mlp.experts.0") == 2 / 4
    assert chosen_share(build("longcat"), "model.layers.0.mlp.experts.0") == 3 / 6
    assert chosen_share(build("llama4"), "model.layers.0.feed_forward.experts.0") == 2 / 4
    if "inkling" in FUSED:  # it began later than the lowest transformers
        assert chosen_share(build("inkling"), "model.layers.0.mlp.shared_experts.0") == 1
    silent = nn.ModuleDict({"experts": experts_of(apart())})
    silent.config = PreTrainedConfig()
    with pytest.raises(ValueError, match=r"^experts: PreTrainedConfig does not say how many exper"):
        chosen_share(silent, "experts.0")


def test_a_gate_of_the_host_is_not_swapped() -> None:
    """The config names no such gate: the folder would be loaded with the host's own."""
    model = build("gpt_oss")
    with pytest.raises(ValueError, match=r"a gate that its host .*OwnGate\(GptOssExperts\)"):
        swap_activations(model, Conversion("donor", activation={"kind": "relu"}))
