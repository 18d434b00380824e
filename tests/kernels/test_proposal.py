"""Proposals in one native call against the router's scores in PyTorch."""

from __future__ import annotations

import copy
import gc
import pickle
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_tools.bench.generate import threads
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.routers import FewBitsRouter
from moe_tools.experts.swapped import swap_activations
from moe_tools.inference.optimized import optimize
from moe_tools.kernels.activations import NAMES, Act
from moe_tools.kernels.cpu.linear import CpuLinear
from moe_tools.kernels.cpu.native import isas
from moe_tools.kernels.cpu.proposal import CpuProposal
from moe_tools.kernels.cpu.rows import FLOATS
from moe_tools.kernels.few_bits import copy_rows, group_int8
from tests.families import build

SILU, IDENTITY = Act("silu"), Act("identity")
TIE = 1e-3
"""Of the median score: x is rounded to int8, and a last place of it may be another one."""
TAU = {"llama": 1e-3, "gpt2": 0.05, "opt": 1e-3}
"""Some neurons of a token are above, and some are not."""
TOKENS = (1, 2, 16, 17, 63, 64, 65, 70)


class Twin:
    """A proposal and the scores that it compares, in float64."""

    def __init__(
        self,
        width: int = 33,
        neurons: int = 70,
        *,
        gated: bool = True,
        biased: bool = True,
        act: Act = SILU,
        up_act: Act = IDENTITY,
        isa: str | None = None,
        bits: Any = 4,
    ) -> None:
        self.act, self.up_act = act, up_act
        self.norm_F = torch.rand(neurons) + 0.1
        self.parts = [self._part(neurons, width, biased, isa, bits) for _ in range(1 + gated)]
        linears = [part[2] for part in self.parts]
        gate = linears[1] if gated else None
        self.native = CpuProposal(linears[0], gate, act, up_act, self.norm_F)

    @staticmethod
    def _part(
        neurons: int, width: int, biased: bool, isa: str | None, bits: Any
    ) -> tuple[Tensor, Tensor | None, CpuLinear]:
        few = copy_rows(torch.randn(neurons, width) / width**0.5, bits)
        bias_F = torch.randn(neurons) / 4 if biased else None
        return few.values_FD().double(), bias_F, CpuLinear.of_codes(few, bias_F, isa=isa)

    def scores_TF(self, x_TD: Tensor) -> Tensor:
        x_TD = group_int8(x_TD.float()).double()
        made = [x_TD @ rows_FD.T + (0 if bias is None else bias) for rows_FD, bias, _ in self.parts]
        if len(made) == 1:
            return self.act(made[0]).abs() * self.norm_F
        return (self.act(made[1]) * self.up_act(made[0])).abs() * self.norm_F


def assert_same(mask_TF: Tensor, scores_TF: Tensor, tau: float) -> None:
    assert mask_TF.shape == scores_TF.shape and mask_TF.dtype == torch.bool
    wrong = mask_TF != (scores_TF > tau)
    near = (scores_TF - tau).abs() <= TIE * max(1.0, float(scores_TF.median()))
    assert not (wrong & ~near).any()
    assert wrong.sum() <= 1 + 0.02 * wrong.numel()


def check(twin: Twin, x_TD: Tensor) -> None:
    scores_TF = twin.scores_TF(x_TD)
    for tau in (0.0, -1.0, float("inf"), float(scores_TF.median())):
        mask_TF = twin.native(x_TD, tau)
        assert_same(mask_TF, scores_TF, tau)
        if tau == -1.0:
            assert mask_TF.all()
        if tau == float("inf"):
            assert not mask_TF.any()


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(NAMES))
    return {
        "twin": {
            "width": draw(st.integers(1, 70) | st.sampled_from([127, 128, 129, 300])),
            "neurons": draw(st.integers(1, 70) | st.sampled_from([128, 300])),
            "gated": draw(st.booleans()),
            "biased": draw(st.booleans()),
            "act": Act(name, 0.1 if name in ("fatrelu", "shifted_relu") else 0.0),
            "up_act": Act(draw(st.sampled_from(["identity", "relu"]))),
            "isa": draw(st.sampled_from(isas())),
            "bits": draw(st.sampled_from([2, 3, 4])),
        },
        "tokens": draw(st.sampled_from(TOKENS)),
        "dtype": draw(st.sampled_from(FLOATS)),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**16)),
    }


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(cases())
def test_the_mask_is_that_of_the_scores(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    twin = Twin(**case["twin"])
    x_TD = torch.randn(case["tokens"], case["twin"]["width"]).to(case["dtype"])
    with threads(case["threads"]):
        check(twin, x_TD)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("gated", [True, False])
def test_so_it_is_on_every_instruction_set(isa: str, gated: bool) -> None:
    torch.manual_seed(0)
    twin = Twin(isa=isa, gated=gated, act=Act("gelu"))
    for tokens in (1, 70):
        check(twin, torch.randn(tokens, 33))


@pytest.mark.parametrize("tokens", [1, 5, 70, 300])
def test_neither_threads_nor_time_nor_company_change_it(tokens: int) -> None:
    """Of many tokens sums are made in another order: where that shows, the median stands apart."""
    torch.manual_seed(0)
    twin = Twin(600, 900)
    x_TD = torch.randn(tokens, 600)
    ordered = twin.scores_TF(x_TD).flatten().sort().values
    middle = ordered[len(ordered) * 45 // 100 : len(ordered) * 55 // 100]
    widest = int(middle.diff().argmax())
    tau = float(middle[widest : widest + 2].mean())
    expected = twin.native(x_TD, tau)
    for count in (1, 2, 5):
        with threads(count):
            assert torch.equal(twin.native(x_TD, tau), expected)
    alone = torch.cat([twin.native(x_TD[t : t + 1], tau) for t in range(tokens)])
    assert torch.equal(alone, expected)


def test_any_leading_dimensions_and_strides() -> None:
    twin = Twin()
    x_TD = torch.randn(33, 6).T
    expected = twin.native(x_TD.contiguous(), 0.1)
    assert torch.equal(twin.native(x_TD, 0.1), expected)
    assert torch.equal(twin.native(x_TD.reshape(2, 3, 33), 0.1), expected.view(2, 3, 70))
    assert torch.equal(twin.native(x_TD[0], 0.1), expected[0])
    assert twin.native(x_TD[:0], 0.1).shape == (0, 70)


def test_a_score_that_is_no_number_is_not_above() -> None:
    twin = Twin(biased=False)
    x_TD = torch.randn(2, 33)
    expected = twin.native(x_TD, 0.1)
    x_TD[1, 3] = torch.nan
    mask_TF = twin.native(x_TD, 0.1)
    assert torch.equal(mask_TF[0], expected[0]) and not mask_TF[1].any()


@pytest.mark.parametrize(
    "x_TD",
    [
        torch.randn(2, 34),
        torch.randn(2, 66),
        torch.tensor(1.0),
        torch.randn(2, 33).double(),
        torch.ones(2, 33, dtype=torch.int8),
        torch.empty(2, 33, device="meta"),
    ],
    ids=lambda x_TD: f"{tuple(x_TD.shape)}-{x_TD.dtype}-{x_TD.device}",
)
def test_another_x_is_refused(x_TD: Tensor) -> None:
    """The kernel would write behind the mask."""
    with pytest.raises(ValueError, match=r"this proposal takes 33 columns in fp32, bf16 or fp16"):
        Twin().native(x_TD, 0.0)


def test_copies_and_pickles_say_the_same() -> None:
    twin, x_TD = Twin(), torch.randn(5, 33)
    expected = twin.native(x_TD, 0.1)
    assert copy.deepcopy(twin.native) is twin.native
    copied = pickle.loads(pickle.dumps(twin.native))
    assert torch.equal(copied(x_TD, 0.1), expected)
    assert torch.equal(pickle.loads(pickle.dumps(copied))(x_TD, 0.1), expected)


def test_a_proposal_keeps_what_its_kernel_reads() -> None:
    twin, x_TD = Twin(200, 200), torch.randn(5, 200)
    expected, native = twin.native(x_TD, 0.1), twin.native
    del twin
    gc.collect()
    _ = [torch.full((200, 200), torch.nan) for _ in range(50)]
    assert torch.equal(native(x_TD, 0.1), expected)


def test_a_change_of_the_norms_is_not_followed() -> None:
    twin, x_TD = Twin(), torch.randn(5, 33)
    expected = twin.native(x_TD, 0.1)
    twin.norm_F.zero_()
    assert torch.equal(twin.native(x_TD, 0.1), expected)


# --- routers --------------------------------------------------------------------------------------


def packed(family: str = "llama", act: str | None = None, **config: Any) -> ExpertFFN:
    torch.manual_seed(0)
    model = build(family, **config)
    if act is not None:
        swap_activations(model, Conversion("donor", activation={"kind": act}))
    options = {"bits": 4, "x_bits": 8}
    selector = {"kind": "threshold", "tau": TAU[family]}
    made = Conversion("donor", 1, "few_bits", selector, router_options=options)
    attach_experts(model, made if act is None else replace(made, activation={"kind": act}))
    return expert_ffns(optimize(model))[0]


def router_of(ffn: ExpertFFN) -> FewBitsRouter:
    assert isinstance(ffn.router, FewBitsRouter)
    return ffn.router


ROUTED = {
    "gate": lambda: packed("llama"),
    "gate, odd width": lambda: packed("llama", hidden_size=34, head_dim=8, intermediate_size=77),
    "DReLU": lambda: packed("llama", act="drelu"),
    "no gate, biases": lambda: packed("gpt2"),
    "relu, biases": lambda: packed("opt"),
}


@pytest.mark.parametrize("tokens", [1, 16, 70])
@pytest.mark.parametrize("kind", ROUTED)
def test_a_packed_router_says_what_its_scores_say(kind: str, tokens: int) -> None:
    ffn = ROUTED[kind]()
    router, x_TD = router_of(ffn), torch.randn(tokens, ffn.projections.size[1])
    scores_TR = router(x_TD)
    for tau in (0.0, -1.0, float("inf"), float(scores_TR.median())):
        mask_TR = router.above_TR(x_TD, tau)
        assert mask_TR is not None
        wrong = mask_TR != (scores_TR > tau)
        assert not (wrong & ((scores_TR - tau).abs() > 1e-5 * scores_TR.max())).any()


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("kind", ROUTED)
def test_by_the_mask_as_by_the_scores_y_is_the_same(kind: str, tokens: int) -> None:
    ffn = ROUTED[kind]()
    x_TD, seen = torch.randn(tokens, ffn.projections.size[1]), cast("list[Any]", [])
    assert ffn.unseen_selector() is not None
    ours = ffn(x_TD)
    ffn.observers.append(seen.append)
    assert torch.equal(ffn(x_TD), ours)
    assert len(seen) == 1 and 0 < seen[0].mask_TE.float().mean() < 1


@pytest.mark.parametrize("when", ["in front", "behind"])
def test_hooks_of_a_packed_router_are_heard(when: str) -> None:
    ffn, x_TD = packed(), torch.randn(3, 16)
    seen: list[Any] = []
    if when == "behind":
        handle = ffn.router.register_forward_hook(lambda *_: seen.append(1))
    else:
        handle = ffn.router.register_forward_pre_hook(lambda *_: seen.append(1))
    expected = ffn(x_TD)
    assert seen == [1]
    handle.remove()
    assert torch.equal(ffn(x_TD), expected)
    assert seen == [1]


def test_another_width_is_refused_by_the_ffn() -> None:
    with pytest.raises(ValueError, match="takes 16 columns"):
        packed()(torch.randn(2, 64))
