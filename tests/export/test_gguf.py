"""GGUF files of dense llamas: equal logits when they are read back, and refusals before a write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from moe_tools.checkpoint.loading import load
from moe_tools.experts.conversion import Conversion
from moe_tools.experts.swapped import swap_activations
from moe_tools.export.gguf import plan
from moe_tools.export.gguf_file import write_gguf
from tests.families import build

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""Of a tiny llama with grouped queries, all of whose rows are whole groups of 32."""


def llama(**changes: Any) -> LlamaForCausalLM:
    """A random one, large enough in its numbers that every one of them counts."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "initializer_range": 0.2, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval().requires_grad_(False)


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """Its matrices in the numbers of f16."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(parameter.half())
    return model


def logits(model: PreTrainedModel) -> Tensor:
    return model(torch.arange(40)[None] * 7 % 96).logits


def write(model: PreTrainedModel, file: Path, **options: Any) -> None:
    write_gguf(plan(model.config), model.state_dict(), file, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"rope_theta": 500.0},
        {"rms_norm_eps": 0.1},
    ],
    ids=["plain", "tied", "ungrouped", "theta", "eps"],
)
def test_a_file_that_is_read_back_computes_the_same(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = rounded(llama(**changes))
    write(model, tmp_path / "f16.gguf")
    read = load(tmp_path / "f16.gguf")
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-5, atol=1e-5)
    names = {tensor.name for tensor in GGUFReader(tmp_path / "f16.gguf").tensors}
    assert ("output.weight" in names) is not bool(changes.get("tie_word_embeddings"))


def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, sliding_window=None)
    model = rounded(MistralForCausalLM(config).eval().requires_grad_(False))
    write(model, tmp_path / "mistral.gguf")
    read = load(tmp_path / "mistral.gguf")
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "error"), [("f16", 5e-4), ("q8_0", 0.01), ("q4_0", 0.15)])
def test_every_kind_holds_the_numbers_that_it_can(kind: Any, error: float, tmp_path: Path) -> None:
    """As a share of the largest number of a matrix; the rows of q and k are in another order."""
    model = llama().bfloat16()
    write(model, tmp_path / "out.gguf", kind=kind)
    tensors = {one.name: one for one in GGUFReader(tmp_path / "out.gguf").tensors}
    wanted = GGMLQuantizationType[kind.upper()]
    for theirs, planned in plan(model.config).tensors.items():
        stored = tensors[planned.name]
        numbers = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).float()
        expected = model.state_dict()[theirs].float()
        if expected.ndim == 1:
            assert stored.tensor_type == GGMLQuantizationType.F32 and torch.equal(numbers, expected)
            continue
        assert stored.tensor_type == wanted
        if planned.heads:
            numbers = numbers.unflatten(0, (planned.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        assert (numbers - expected).abs().max() < error * expected.abs().max()


def test_rows_that_are_no_whole_groups_are_f16(tmp_path: Path) -> None:
    write(llama(hidden_size=80), tmp_path / "out.gguf", kind="q4_0")  # 80 and 160 columns
    for tensor in GGUFReader(tmp_path / "out.gguf").tensors:
        if len(tensor.shape) > 1:
            whole = "ffn_down" in tensor.name
            wanted = GGMLQuantizationType.Q4_0 if whole else GGMLQuantizationType.F16
            assert tensor.tensor_type == wanted
    assert logits(load(tmp_path / "out.gguf")).isfinite().all()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (build("qwen2").config, "this is a qwen2"),
        (build("mixtral").config, "this is a mixtral"),
        (LlamaConfig(**SIZES, hidden_act="relu"), "the activation relu, where llama.cpp computes"),
        (LlamaConfig(**SIZES, attention_bias=True), "has attention_bias True"),
        (LlamaConfig(**SIZES, mlp_bias=True), "has mlp_bias True"),
        (MistralConfig(**SIZES, sliding_window=64), "has sliding_window 64"),
        (
            LlamaConfig(**SIZES, rope_scaling={"rope_type": "linear", "factor": 2.0}),
            "has rope scaling of type linear",
        ),
        (LlamaConfig(**SIZES, head_dim=32), "has 4 heads of 32, which is not its width of 64"),
    ],
    ids=["qwen2", "mixtral", "relu", "attention", "mlp", "window", "rope", "heads"],
)
def test_what_is_no_plain_llama_is_refused_by_its_config(config: Any, reason: str) -> None:
    with pytest.raises(
        ValueError, match=f"and .*{reason}.*: `moe-tools export --to dense` writes a folder"
    ):
        plan(config)


def test_an_activation_of_ours_is_refused() -> None:
    model = llama()
    swap_activations(model, Conversion("donor", activation={"kind": "drelu"}))
    with pytest.raises(ValueError, match=r"this one has the activation drelu, where llama\.cpp"):
        plan(model.config)


def test_tensors_of_another_model_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    planned, tensors = plan(llama().config), llama().state_dict()
    file = tmp_path / "out.gguf"
    cases = [
        ({**tensors, "model.layers.0.mlp.bias_D": torch.ones(64)}, "no place for .*mlp.bias_D"),
        ({"lm_head.weight": tensors["lm_head.weight"]}, "model.embed_tokens.weight, .* not there"),
        ({**tensors, "lm_head.weight": torch.ones(95, 64)}, r"output.weight is \(95, 64\), expect"),
        ({**tensors, "lm_head.weight": torch.full((96, 64), 1e6)}, "1000000.0, which f16 does not"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            write_gguf(planned, given, file)
        assert not file.exists()
