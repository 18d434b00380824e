"""What a forward pass over plain text takes."""

from __future__ import annotations

import pytest
import torch

from moe_tools.hosts.inputs import model_inputs
from tests.families import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_plain_text(family: str) -> None:
    model, block_BT = build(family), torch.randint(3, 64, (2, 9))
    inputs = model_inputs(model, block_BT)
    assert all(argument is block_BT for argument in inputs.values())
    assert model(**inputs).logits.shape == (2, 9, 64)
    sides = {"input_ids", "decoder_input_ids"} if family.startswith("t5") else {"input_ids"}
    assert inputs.keys() == sides
