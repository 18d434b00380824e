"""What selection by the prompt costs, against the neurons that are left behind the prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moe_tools.hosts.ffn import unfused_ffns
from moe_tools.measure.evaluate import evaluate
from moe_tools.report.by_prompt import measured_by_prompt
from tests.families import build, logits

AFTER, LENGTH = 5, 12
TEXT_BT = torch.randint(5, 64, (16, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_bytes_are_those_of_the_neurons_behind_the_prompt(family: str, share: float) -> None:
    model = build(family)
    left: dict[str, list[Tensor]] = {}
    handles = []
    dense = logits(model)
    with measured_by_prompt(model, share, AFTER) as correct:
        for ffn in unfused_ffns(model):

            def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = ffn.name) -> None:
                h_BTF = args[0].detach().view(-1, LENGTH, 48)
                left.setdefault(name, []).append((h_BTF[:, AFTER:] != 0).any(1))

            handles.append(ffn.down.register_forward_pre_hook(keep))
        seen = evaluate(model, TEXT_BT, batch_size=2, after=AFTER)
        for handle in handles:
            handle.remove()
        found = correct(seen)
    masks = [torch.cat(parts) for parts in left.values()]
    assert seen.tokens == 16 * (LENGTH - AFTER)
    for size in (1, 4, 16):
        unions = [mask_SF.view(size, -1, 48).any(0).float().mean() for mask_SF in masks]
        expected = float(sum(unions) / len(unions))
        assert found.traffic[size].ffn_share == pytest.approx(expected, abs=1e-6)
    assert found.traffic[1].ffn_share == pytest.approx(share)
    assert found.flops.ffn_share == pytest.approx(share)
    assert found.ffn_sparsity == pytest.approx(1 - share)
    assert torch.equal(logits(model), dense)  # and nothing stays: nine tokens behind the fifth


def test_an_moe_host_has_figures_for_one_sequence_alone() -> None:
    model = build("mixtral")
    with measured_by_prompt(model, 0.5, AFTER) as correct:
        found = correct(evaluate(model, TEXT_BT, after=AFTER))
    assert list(found.traffic) == [1]
    assert 0.5 <= found.traffic[1].ffn_share < 0.8  # an expert keeps all of what it saw nothing of


def test_without_a_prompt_there_is_nothing_to_measure() -> None:
    with (
        pytest.raises(ValueError, match="measured on what follows it: give --after"),
        measured_by_prompt(build("llama"), 0.5, 0),
    ):
        pass
