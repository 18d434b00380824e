"""What the network carries, against section 7 of the paper and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_tools.measure.gpus import GPUS, gpu
from moe_tools.measure.memory import ModelStates
from moe_tools.measure.network import sent_bytes


def states(*, summed: bool = False, teacher: int = 0) -> ModelStates:
    model = [nn.Parameter(torch.empty(1000, dtype=torch.bfloat16, device="meta"))]
    return ModelStates.of(model, model, teacher, summed=summed)


def test_the_ratios_of_the_paper() -> None:
    """2 psi, 2 psi, 2 psi, 3 psi (arXiv 1910.02054, section 7), of many processes."""
    sent = [sent_bytes(states(), stage, 10**6) / 2000 for stage in range(4)]
    assert sent == pytest.approx([2, 2, 2, 3], rel=1e-5)


def test_a_ring_sends_less_of_few_and_nothing_of_one() -> None:
    assert [sent_bytes(states(), stage, 1) for stage in range(4)] == [0, 0, 0, 0]
    assert [sent_bytes(states(), stage, 4) for stage in range(4)] == [3000, 3000, 3000, 4500]


def test_every_pass_is_sent_where_gradients_are_sharded() -> None:
    """PyTorch alone sends sums in fp32, once an optimizer step; stage 1 once, in bf16."""
    sent = [sent_bytes(states(summed=True), stage, 4, passes=10) for stage in range(4)]
    ring = 3 / 4
    assert sent == [2 * 4000 * ring, 2 * 2000 * ring, 11 * 2000 * ring, 30 * 2000 * ring]


def test_a_sharded_teacher_is_gathered_in_every_pass() -> None:
    sent = [
        sent_bytes(states(teacher=800), 3, 4, passes=2, teacher=where)
        for where in ("whole", "sharded")
    ]
    assert sent[1] - sent[0] == 2 * 800 * 3 / 4


def test_adapters_send_little() -> None:
    frozen = [nn.Parameter(torch.empty(1000, dtype=torch.bfloat16, device="meta"))]
    added = [nn.Parameter(torch.empty(10, dtype=torch.bfloat16, device="meta"))]
    held = ModelStates.of([*frozen, *added], added)
    assert sent_bytes(held, 1, 2) == 2 * 20 / 2
    assert sent_bytes(held, 3, 2) == (2 * 2020 + 20) / 2  # whole weights are gathered all the same


@pytest.mark.parametrize(
    ("name", "whole"),
    [("h100", "H100-80GB"), ("A100-80", "A100-80GB"), ("RTX 4090", "RTX4090-24GB")],
)
def test_cards_are_known_by_the_beginning_of_their_names(name: str, whole: str) -> None:
    assert gpu(name) == (whole, GPUS[whole])


def test_no_card_is_faster_than_its_memory_says() -> None:
    """A figure with sparsity, or a mistyped power of ten, would stand out among these ratios."""
    for name, card in GPUS.items():
        assert 50 < card.flops / card.bandwidth < 450, name
        assert card.memory == float(name.rpartition("-")[2].removesuffix("GB")) * 1e9
        assert card.link < card.bandwidth
