"""Texts that share a row: none sees another, in the forward pass and in the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.data.batch import Batch
from moe_tools.data.batching import isolated, padded
from moe_tools.data.limits import continues_text
from moe_tools.data.rows import Row
from moe_tools.hosts.inputs import model_inputs
from moe_tools.hosts.isolation import check_packing, prove_isolation
from tests.families import FAMILIES, build

CAUSAL = [name for name in FAMILIES if continues_text(build(name))]
REFUSED = {"opt": "does not keep texts apart"}
"""OPT counts its positions from the attention mask and not from what it is told."""
LENGTHS = (5, 1, 9, 3)


def texts() -> list[Row]:
    draw = torch.Generator().manual_seed(1)
    return [Row(torch.randint(3, 60, (length,), generator=draw).numpy()) for length in LENGTHS]


def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(**model_inputs(model, batch), use_cache=False).logits


def loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    found, labels = logits(model, batch).flatten(0, 1), batch.next_labels_BT().flatten()
    return nn.functional.cross_entropy(found, labels, reduction="sum")


@pytest.mark.parametrize("family", CAUSAL)
def test_a_text_is_computed_as_if_it_were_alone(family: str) -> None:
    model = build(family).eval()
    check_packing(model, "padded")
    if family in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family]):
            prove_isolation(model)
        ways = [padded]
    else:
        prove_isolation(model)
        ways = [padded, isolated]
    alone = [logits(model, padded([row])) for row in texts()]
    for way in ways:
        found = logits(model, way(texts()))
        if way is padded:
            rows = [found[at, :length] for at, length in enumerate(LENGTHS)]
        else:
            rows = [*found[0].split(LENGTHS)]
        for one, expected in zip(rows, alone, strict=True):
            torch.testing.assert_close(one, expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("way", [padded, isolated])
def test_the_gradient_is_the_sum_of_those_alone(family: str, way: Any) -> None:
    model = build(family)
    for row in texts():
        if len(row.ids_T) > 1:
            loss(model, padded([row])).backward()
    expected = {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }
    model.zero_grad()
    loss(model, way(texts())).backward()
    for name, one in model.named_parameters():
        if one.grad is not None:
            torch.testing.assert_close(one.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_a_model_that_ignores_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    forward = model.forward

    def deaf(*, position_ids: Tensor | None = None, **options: Any) -> Any:
        return forward(**options)

    monkeypatch.setattr(model, "forward", deaf)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not .* use packing: padded"):
        prove_isolation(model)


def test_what_continues_no_text_has_one_packing() -> None:
    for packing in ("isolated", "padded"):
        with pytest.raises(ValueError, match=f"packing: {packing} is of causal language models"):
            check_packing(build("bert"), packing)
    check_packing(build("bert"), "joined")


def test_the_proof_leaves_the_model_as_it_was() -> None:
    model = build("llama").train()
    state = torch.get_rng_state()
    prove_isolation(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(one.grad is None for one in model.parameters())
