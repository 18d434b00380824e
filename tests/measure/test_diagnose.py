from __future__ import annotations

import pytest
from transformers import BitNetConfig, BitNetForCausalLM

from moe_tools.bench.kernels import backends
from moe_tools.experts.conversion import read_conversion
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.twin import build_twin, shrink
from moe_tools.measure.diagnose import Shape, diagnose
from tests.families import (
    EXPERT_SIZE,
    FAMILIES,
    NEURONS,
    UNGATED,
    build,
    logits,
    routed,
)

FFNS = {"mixtral": 8, "olmoe": 8, "qwen2_moe": 6, "qwen3_moe": 5, "t5-relu": 4, "t5-gated": 4}
"""Of Qwen-MoE, one layer is dense; in the other, four experts, one of Qwen2 shared beside them."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_one_shape(family: str) -> None:
    found = diagnose(build(family))
    (shape,) = found.shapes
    assert (shape.count, shape.width, shape.neurons) == (FFNS.get(family, 2), 16, NEURONS)
    assert shape.gated == (family not in UNGATED)
    assert shape.expert_sizes == (4, 8, 16)
    assert found.conversion is None
    assert 0 < found.ffn_parameter_share < 1 and 0 < found.ffn_flop_share < 1


def test_a_llama_by_hand() -> None:
    found = diagnose(build("llama", mlp_bias=False))
    assert found.shapes == (Shape(2, 16, 48, "SiLU", True, (4, 8, 16)),)
    assert found.layouts == ("gate_proj, up_proj, act_fn, down_proj",)
    assert (found.host, found.dtype) == ("LlamaForCausalLM", "float32")
    ffn, norms = 2 * 3 * 16 * 48, 5 * 16
    assert found.ffn_parameters == ffn
    assert found.parameters == ffn + 2 * 4 * 16 * 16 + 2 * 64 * 16 + norms
    assert found.flops.ffn_dense == 2 * ffn


def test_a_converted_model_says_how() -> None:
    model, _ = routed(build("gpt2"))
    found = diagnose(model)
    assert found.conversion == read_conversion(model)
    assert found.shapes[0].count == 2 and not found.shapes[0].gated
    assert found.flops.router == 2 * 2 * 16 * NEURONS / EXPERT_SIZE


def test_an_activation_is_named_by_its_class() -> None:
    names = {family: diagnose(build(family)).shapes[0].activation for family in ("bert", "t5-relu")}
    assert names == {"bert": "GELU", "t5-relu": "ReLU"}


def test_what_cannot_be_converted_is_refused() -> None:
    model = build_twin(BitNetForCausalLM, shrink(BitNetConfig()))
    with pytest.raises(ValueError, match="its neurons are coupled"):
        diagnose(model)


def test_a_diagnosis_changes_nothing() -> None:
    model, _ = routed(build("llama"))
    before = logits(model)
    diagnose(model)
    assert (logits(model) == before).all()
    with record_routing(model) as routings:
        logits(model)
    assert len(routings) == 2


def test_the_reference_is_a_backend_and_auto_is_none() -> None:
    assert "reference" in backends() and "auto" not in backends()
