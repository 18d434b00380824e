"""A folder that an earlier version wrote loads for ever.

format_1_llama/ was written at version 0.1.0, before the folders of the code moved: a tiny llama
under dReLU with norm routers, one shared expert and means for what is off;
format_1_logits.safetensors has what it said then.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_tools.checkpoint.loading import load
from moe_tools.checkpoint.saving import save
from moe_tools.experts.experts import expert_ffns
from moe_tools.experts.selectors import DynamicK
from tests.families import logits

HERE = Path(__file__).parent
FOLDER = HERE / "format_1_llama"


def test_a_folder_of_format_1_computes_what_it_did(tmp_path: Path) -> None:
    expected = load_file(HERE / "format_1_logits.safetensors")["logits"]
    model = load(FOLDER)
    assert {ffn.selector for ffn in expert_ffns(model)} == {DynamicK(0.5)}
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    by_auto = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert torch.equal(logits(by_auto), logits(model))
    save(model, tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
