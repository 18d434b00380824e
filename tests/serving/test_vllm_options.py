"""What is refused before vLLM builds anything; vLLM itself is not needed for that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from moe_tools.serving.vllm_options import checked_conversion, read_options
from tests.families import THRESHOLD

CHANGES = {
    "tensor_parallel_size": (2, "tensor_parallel_size is 2, .* leave it at 1"),
    "pipeline_parallel_size": (4, "pipeline_parallel_size is 4, .* leave it at 1"),
    "quant_config": (object(), r"its weights are quantised \(fp8\)"),
    "lora_config": (object(), "merge the adapter"),
    "convert_type": ("embed", "--convert embed is not tested"),
    "is_moe": (True, "its host is a mixture of experts itself"),
}
"""A setting of vLLM -> a value that is refused, and how."""


def settings(block: dict[str, Any] | None, **changes: Any) -> Any:
    """A `VllmConfig`, as far as we read it."""
    config = LlamaConfig()
    if block is not None:
        config.moe_tools = block
    plain = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "quant_config": None}
    said = plain | {"lora_config": None, "convert_type": "none", "is_moe": False} | changes
    model = SimpleNamespace(model="FOLDER", hf_config=config, quantization="fp8", **said)
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(**said), **said)


def test_a_routed_folder_is_taken() -> None:
    assert checked_conversion(settings(THRESHOLD.to_dict())) == THRESHOLD


@pytest.mark.parametrize("key", CHANGES)
def test_what_vllm_was_asked_for_is_checked(key: str) -> None:
    value, words = CHANGES[key]
    with pytest.raises(ValueError, match=f"^FOLDER cannot run in vLLM: .*{words}"):
        checked_conversion(settings(THRESHOLD.to_dict(), **{key: value}))


def test_a_folder_without_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="FOLDER has no moe_tools block"):
        checked_conversion(settings(None))


def test_selection_by_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt_share 0\.5"):
        checked_conversion(settings({"donor": "x", "format": 3, "prompt_share": 0.5}))


def test_options_are_read() -> None:
    assert not read_options({}).optimize
    assert not read_options({"of another plugin": 1}).optimize
    options = read_options({"moe_tools": {"optimize": True, "packed_dtype": "int8"}})
    assert (options.optimize, options.dtype) == (True, torch.int8)
    assert read_options({"moe_tools": {"optimize": True}}).dtype is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "must be a mapping"),
        ({"optimise": True}, "did you mean 'optimize'"),
        ({"optimize": "yes"}, "optimize is 'yes', but must be true or false"),
        ({"optimize": True, "packed_dtype": "int3"}, "unknown packed_dtype 'int3'"),
        ({"packed_dtype": "int8"}, 'packed_dtype int8 needs "optimize": true'),
    ],
)
def test_wrong_options_are_refused(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_options({"moe_tools": given})
