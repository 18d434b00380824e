"""The matrix of a linear that keeps codes, and what is done with a host of such linears."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import every_expert_on
from moe_tools.experts.routers import ROUTERS
from moe_tools.hosts.dequantise import dequantise
from moe_tools.hosts.ffn import find_ffns, permute_neurons, unfused_ffns
from moe_tools.hosts.linears import dequantised, rows
from moe_tools.hosts.moe_host import unfuse_experts
from moe_tools.inference.optimized import optimize
from moe_tools.measure.flops import forward_flops
from moe_tools.training.checks import check_train
from moe_tools.training.train import Train
from tests.coded import CodedLinear, quantise_ffns
from tests.families import EXPERT_SIZE, NEURONS, build, logits

TOPK = {"kind": "topk", "k": 2}
OLD = "load the model with moe_tools.load, which dequantises"


class PackedLinear(nn.Module):
    """Keeps no weight at all: two codes in a byte, as four-bit quantisers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax() / 7
        codes = (linear.weight.detach() / scale).round().to(torch.uint8) + 8
        self.register_buffer("scale", scale)
        self.register_buffer("packed", codes[:, ::2] | codes[:, 1::2] << 4)
        self.bias = linear.bias

    def forward(self, x_TD: Tensor) -> Tensor:
        both = torch.stack([self.packed & 15, self.packed >> 4], dim=-1).flatten(1)
        return nn.functional.linear(x_TD, (both.float() - 8) * self.scale, self.bias)


class Fixed(nn.Linear):
    """Cuts its input off at a scale that calibration found: a unit vector does not show it."""

    limit = 0.01

    def forward(self, x_TD: Tensor) -> Tensor:
        return super().forward(x_TD.clamp(-self.limit, self.limit))


def test_the_rows_of_a_packed_linear_are_its_numbers() -> None:
    linear = nn.Linear(32, 8)
    packed = PackedLinear(linear)
    found = rows(packed)
    assert found.shape == linear.weight.shape
    torch.testing.assert_close(found, linear.weight, rtol=0, atol=0.51 * float(packed.scale))


def test_what_is_no_matrix_is_refused() -> None:
    linear = Fixed(16, 4)
    with pytest.raises(ValueError, match=r"what it computes is not the product with one matrix"):
        dequantised(linear)


def test_what_does_not_run_is_refused() -> None:
    class OnDevice(CodedLinear):
        def forward(self, x_TD: Tensor) -> Tensor:
            raise RuntimeError("no kernel for cpu\nmore")

    with pytest.raises(ValueError, match=r"OnDevice cannot be read \(no kernel for cpu\): load"):
        rows(OnDevice(nn.Linear(8, 4), torch.int8))


def quantised() -> nn.Module:
    torch.manual_seed(0)
    model = build("llama")
    quantise_ffns(model)
    return model


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_works_on_a_quantised_donor(router: str) -> None:
    """It scores as on the donor's dequantised self, and the host computes as before."""
    model, plain = quantised(), quantised()
    dequantise(plain, torch.float32)
    exact = logits(model)
    conversion = Conversion("donor", EXPERT_SIZE, router, TOPK, when_off="mean")
    made = []
    for host in (model, plain):
        torch.manual_seed(1)  # some routers start at random
        made.append(attach_experts(host, conversion)[0])
    x_TD = torch.randn(5, 16)
    scores_TR, expected_TR = made[0].router(x_TD), made[1].router(x_TD)
    torch.testing.assert_close(scores_TR, expected_TR, rtol=1e-3, atol=1e-3)
    assert made[0].off_F is not None and made[0].off_F.dtype == torch.float32
    with every_expert_on(model):
        assert torch.equal(logits(model), exact)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_that_is_read_from_a_file_needs_no_weight_of_its_host(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantised linear may not run yet while its model is loaded."""

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("not ready")

    model = quantised()
    monkeypatch.setattr(CodedLinear, "forward", refuse)
    (layout,) = {ffn.layout for ffn in find_ffns(model)}
    known = {"layouts": {"LlamaMLP": layout.to_dict()}}
    conversion = Conversion("donor", EXPERT_SIZE, router, TOPK, **known)
    for ffn in attach_experts(model, conversion, empty=True):
        own = [ffn.get_parameter(key) for key in ffn.added() if key in dict(ffn.named_parameters())]
        assert all(tensor.is_meta for tensor in own)


def test_codes_are_not_reordered_packed_or_trained() -> None:
    model = quantised()
    order_F = torch.arange(NEURONS).flip(0)
    with pytest.raises(ValueError, match=rf"layers.0.mlp: its CodedLinear is quantised.*{OLD}"):
        permute_neurons(unfused_ffns(model)[0], order_F)
    with pytest.raises(ValueError, match=r"mlp.gate_proj is quantised.*adapters on it by PEFT"):
        check_train(model, Train(8), None)  # type: ignore[arg-type]
    attach_experts(model, Conversion("donor", EXPERT_SIZE, "sigmoid", TOPK))
    with pytest.raises(ValueError, match="a projection is a CodedLinear, no plain linear"):
        optimize(model)


def test_dequantised_it_is_any_plain_model() -> None:
    model = quantised()
    exact = logits(model)
    dequantise(model, torch.float32)
    assert not any(isinstance(module, CodedLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), exact, rtol=1e-4, atol=1e-4)
    permute_neurons(unfused_ffns(model)[0], torch.arange(NEURONS).flip(0))
    torch.testing.assert_close(logits(model), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_dequantised_after_its_conversion_it_is_still_routed(masked: bool) -> None:
    """Also where our module has the place of one linear and listens to another."""
    model = quantised()
    (layout,) = {ffn.layout for ffn in find_ffns(model)}
    row = layout.as_masked() if masked else layout
    known = {"layouts": {"LlamaMLP": row.to_dict()}}
    attach_experts(model, Conversion("donor", EXPERT_SIZE, "oracle", TOPK, **known))
    exact = logits(model)
    dequantise(model, torch.float32)
    assert not any(isinstance(module, CodedLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), exact, rtol=1e-4, atol=1e-4)


def test_its_work_is_that_of_the_plain_model() -> None:
    model = build("llama")
    expected = forward_flops(model, 16)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(path, PackedLinear(module))
    assert forward_flops(model, 16) == expected


def test_quantised_experts_of_an_moe_host_are_refused() -> None:
    """Their codes have the shape of numbers."""
    model = build("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"experts: down_proj is quantised \(torch.float8.*load"):
        unfuse_experts(model)
