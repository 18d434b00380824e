"""How attention is computed in a train step: another way, the same model, and nothing kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_tools.checkpoint.saving import save
from moe_tools.steps.launch import ATTENTIONS, Launch, check_launch
from moe_tools.training.attention import attention
from moe_tools.training.train import train
from tests.families import build
from tests.training.test_train import SOFT, changed, converted, state, text


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_model_trains_with_the_attention_that_is_asked_for(name: str, tmp_path: Path) -> None:
    model, plain = converted(), converted()
    seen: set[str] = set()
    model.model.register_forward_pre_hook(lambda *_: seen.add(model.config._attn_implementation))
    before = model.config._attn_implementation
    train(plain, SOFT, text(32), tmp_path / "plain")
    train(model, SOFT, text(32), tmp_path / "other", launch=Launch(attention=name))
    assert seen == {name} and model.config._attn_implementation == before
    for key, value in state(model).items():
        assert (value - plain.state_dict()[key]).abs().max() < 1e-5, key
    assert changed(model, state(converted()))
    save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not any("attn_implementation" in key for key in config)


def test_it_is_put_back_after_an_error() -> None:
    model = build("llama")
    with pytest.raises(ArithmeticError), attention(model, "eager"):
        assert model.config._attn_implementation == "eager"
        raise ArithmeticError
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_cannot_is_named() -> None:
    model, named = build("llama"), "LlamaForCausalLM cannot take --attention"
    with pytest.raises(ValueError, match=named) as said, attention(model, "flash_attention_2"):
        pass
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("launch", "dtype", "message"),
    [
        (Launch(attention="sdpaa"), None, "unknown attention 'sdpaa'; did you mean 'sdpa'"),
        (
            Launch(attention="flash_attention_2"),
            torch.bfloat16,
            "--attention flash_attention_2 runs on a GPU alone, but the run is on cpu",
        ),
        (
            Launch("cuda", attention="flash_attention_2"),
            torch.float32,
            "--attention flash_attention_2 computes in 16 bits: add --dtype bf16",
        ),
        (
            Launch("cuda", attention="flash_attention_2"),
            torch.bfloat16,
            "needs the package flash-attn, which is not installed",
        ),
        (
            Launch("cuda:1", attention="flash_attention_3"),
            torch.bfloat16,
            "needs the package flash-attn-3, which is not installed",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    launch: Launch, dtype: torch.dtype | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(f"transformers.utils.import_utils.{name}", lambda: False)
    with pytest.raises(ValueError, match=message):
        check_launch(launch, dtype)


def test_a_package_that_is_there_is_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(f"transformers.utils.import_utils.{name}", lambda: True)
    for name in ATTENTIONS:
        check_launch(Launch("cuda", attention=name), torch.bfloat16)
