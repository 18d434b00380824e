"""Converted folders under the quantisers of transformers, and folders that a quantiser wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, TorchAoConfig

from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.loading import is_quantised_source, load, load_classifier
from moe_tools.checkpoint.parts import Part
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import ExpertFFN, every_expert_on, expert_ffns
from moe_tools.experts.routing import record_routing
from moe_tools.hosts.ffn import find_ffns, permute_neurons, unfused_ffns
from moe_tools.measure.inputs import count_inputs
from moe_tools.recipe import Threshold
from moe_tools.runs.stream import is_large
from moe_tools.steps.step import Work
from tests.families import EXPERT_SIZE, FAMILIES, build, logits, model_inputs

ON_DISK = Conversion("donor", EXPERT_SIZE, "sigmoid", {"kind": "threshold", "tau": 0.5})
TOPK = {"kind": "topk", "k": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))  # it can be saved


def bitsandbytes(bits: int) -> Callable[[], Any]:
    def config() -> Any:
        pytest.importorskip("bitsandbytes")
        return transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})

    return config


def quanto() -> Any:
    pytest.importorskip("optimum.quanto")
    return transformers.QuantoConfig(weights="int8")


QUANTISERS = {
    "torchao": torchao,
    "bitsandbytes8": bitsandbytes(8),
    "bitsandbytes4": bitsandbytes(4),
    "quanto": quanto,
}
every_quantiser = pytest.mark.parametrize("quantiser", QUANTISERS.values(), ids=QUANTISERS)


def converted(family: str = "llama", conversion: Conversion = ON_DISK) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = SIZES if family in ("llama", "bert", "phi3", "qwen2") else {}
    model = build(family, **sizes)
    for ffn in attach_experts(model, conversion):
        for tensor in ffn.router.parameters():
            torch.nn.init.normal_(tensor)
        if ffn.off_F is not None:
            ffn.off_F.normal_(0, 0.3)
    return model


def stock(folder: Path, family: str = "llama", **options: Any) -> PreTrainedModel:
    return FAMILIES[family].model.from_pretrained(folder, dtype=torch.float32, **options)


def masks(model: PreTrainedModel) -> list[Tensor]:
    with record_routing(model) as routings:
        logits(model)
    return [routing.mask_TE for routing in routings]


def under(model: PreTrainedModel, masks: list[Tensor]) -> Tensor:
    """Logits with these masks, whatever the routers say."""
    ffns = expert_ffns(model)
    for ffn, mask_TE in zip(ffns, masks, strict=True):
        ffn.interventions.append(lambda _, mask_TE=mask_TE: mask_TE)
    found = logits(model)
    for ffn in ffns:
        ffn.interventions.clear()
    return found


@every_quantiser
@pytest.mark.parametrize("family", ["llama", "phi3", "bert"])
def test_with_every_expert_on_it_is_the_stock_class_under_the_same_quantiser(
    family: str, quantiser: Callable[[], Any], tmp_path: Path
) -> None:
    save(converted(family), tmp_path / "model")
    with transformers_patched(False):
        exact = logits(stock(tmp_path / "model", family))
        expected = logits(stock(tmp_path / "model", family, quantization_config=quantiser()))
    model = stock(tmp_path / "model", family, quantization_config=quantiser())
    assert len(expert_ffns(model)) == 2
    assert expert_ffns(model)[0].router.get_parameter("weight").dtype == torch.float32
    assert (expected - exact).abs().max() > 0
    with every_expert_on(model):
        assert torch.equal(logits(model), expected)


@every_quantiser
def test_thresholds_drop_the_inputs_of_quantised_linears(
    quantiser: Callable[[], Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build("llama", **SIZES)
    refuse: Any = pytest.fail
    text_BT = torch.randint(3, 64, (8, 32))
    step = Threshold(0.5, where="all", rotate=True)
    step.apply(model, Work(tmp_path, "donor", 0, lambda _: text_BT, refuse, refuse))
    save(model, tmp_path / "model")
    with transformers_patched(False):
        plain = stock(tmp_path / "model", quantization_config=quantiser())
    loaded = stock(tmp_path / "model", quantization_config=quantiser())
    with every_expert_on(loaded):
        assert torch.equal(logits(loaded), logits(plain))
    with count_inputs(loaded) as counts, torch.no_grad():
        loaded(input_ids=text_BT)
    assert len(counts) == 8
    assert all(one.sparsity == pytest.approx(0.5, abs=0.1) for one in counts)
    for ffn, same in zip(find_ffns(loaded), find_ffns(plain), strict=True):
        assert torch.equal(ffn.weights().up_FD, same.weights().up_FD)  # read as they are


@every_quantiser
def test_routed_it_is_off_by_what_the_quantiser_rounds(
    quantiser: Callable[[], Any], tmp_path: Path
) -> None:
    """And the mean of what is off is no code of eight bits."""
    before = converted(conversion=Conversion(**vars(ON_DISK) | {"when_off": "mean"}))
    save(before, tmp_path / "model")
    with transformers_patched(False):
        exact = logits(stock(tmp_path / "model"))
        rounded = logits(stock(tmp_path / "model", quantization_config=quantiser()))
    model = stock(tmp_path / "model", quantization_config=quantiser())
    chosen = masks(before)
    error = (under(model, chosen) - under(before, chosen)).square().mean().sqrt()
    assert 0 < error <= 1.5 * (rounded - exact).square().mean().sqrt()


@pytest.mark.parametrize("router", ["mlp", "mean_gate", "oracle", "int8_gate"])
def test_routers_of_every_make_are_read_from_the_folder(router: str, tmp_path: Path) -> None:
    before = converted(conversion=Conversion("donor", EXPERT_SIZE, router, TOPK))
    save(before, tmp_path / "model")
    ffn, exact = (
        expert_ffns(model)[0]
        for model in (stock(tmp_path / "model", quantization_config=torchao()), before)
    )
    x_TD = torch.randn(5, 64)
    expected_TR = exact.router(x_TD)
    error = (ffn.router(x_TD) - expected_TR).abs().max() / expected_TR.abs().max()
    assert error <= 0.05
    assert (error == 0) == (router in ("mlp", "mean_gate"))  # the others read quantised rows


def test_what_quantises_a_loaded_model_leaves_the_routers(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    save(converted(conversion=Conversion("donor", EXPERT_SIZE, "mlp", TOPK)), tmp_path / "model")
    model, exact = stock(tmp_path / "model"), stock(tmp_path / "model")
    quantize_(model, Int8WeightOnlyConfig())
    with transformers_patched(False):
        dense = stock(tmp_path / "model")
    quantize_(dense, Int8WeightOnlyConfig())
    with every_expert_on(model):
        assert torch.equal(logits(model), logits(dense))
    x_TD = torch.randn(5, 64)
    pairs = zip(expert_ffns(model), expert_ffns(exact), strict=True)
    assert all(torch.equal(ours.router(x_TD), theirs.router(x_TD)) for ours, theirs in pairs)


@every_quantiser
def test_adapters_train_on_a_quantised_host(quantiser: Callable[[], Any], tmp_path: Path) -> None:
    """QLoRA, arXiv 2305.14314, by PEFT: every linear gets an adapter, and no router."""
    save(converted(conversion=Conversion("donor", EXPERT_SIZE, "mlp", TOPK)), tmp_path / "model")
    other = stock(tmp_path / "model", quantization_config=quantiser())
    with every_expert_on(other):  # a step of fp16 may turn the mask of a token
        before = logits(other)
    # Another model: bitsandbytes has no gradient on a CPU once it has run for inference there.
    model = stock(tmp_path / "model", quantization_config=quantiser())
    adapted: Any = get_peft_model(
        prepare_model_for_kbit_training(model, False),  # type: ignore[no-untyped-call]
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapters = {name: each for name, each in adapted.named_parameters() if each.requires_grad}
    assert len(adapters) == 2 * 2 * 7 and not any("router" in name for name in adapters)
    ids = model_inputs(model)["input_ids"]
    with every_expert_on(adapted):
        out = adapted.train()(ids, labels=ids)
    assert (out.logits - before).abs().max() <= 0.02 * before.abs().max()
    out.loss.backward()
    moved = [each.grad for name, each in adapters.items() if "lora_B" in name]
    assert all(grad is not None and bool(grad.any()) for grad in moved)


def write(folder: Path, quantiser: Callable[[], Any], family: str = "llama") -> PreTrainedModel:
    """A converted folder as a quantiser writes it; returns the model that was written."""
    save(converted(family), folder / "exact")
    model = stock(folder / "exact", family, quantization_config=quantiser())
    model.save_pretrained(folder / "model")
    return model


def test_a_quantiser_writes_the_names_of_the_host(tmp_path: Path) -> None:
    """BERT's linears are elsewhere in our module than in the host."""
    model = write(tmp_path, torchao, "bert")
    again = FAMILIES["bert"].model.from_pretrained(tmp_path / "model")
    assert len(expert_ffns(again)) == 2
    assert torch.equal(logits(again), logits(model))
    with transformers_patched(False):
        _, report = FAMILIES["bert"].model.from_pretrained(
            tmp_path / "model", output_loading_info=True
        )
    assert not report["missing_keys"]
    assert all(".router." in key for key in report["unexpected_keys"])


@pytest.mark.parametrize(
    "quantiser", [torchao, bitsandbytes(8), bitsandbytes(4)], ids=["torchao", "8", "4"]
)
def test_moe_tools_loads_what_a_quantiser_wrote_as_plain_weights(
    quantiser: Callable[[], Any], tmp_path: Path
) -> None:
    written = write(tmp_path, quantiser)
    model = load(tmp_path / "model", dtype=torch.float32)
    assert {type(parameter) for parameter in model.parameters()} == {torch.nn.Parameter}
    exact = load(tmp_path / "exact", dtype=torch.float32)
    chosen = masks(exact)
    near, far = (
        (under(one, chosen) - under(written, chosen)).square().mean() for one in (model, exact)
    )
    assert near <= 0.5 * far  # what a quantiser of activations rounds is left

    save(model, tmp_path / "plain")
    config = AutoConfig.from_pretrained(tmp_path / "plain")
    assert not hasattr(config, "quantization_config") and not is_quantised_source(
        str(tmp_path / "plain")
    )
    assert torch.equal(logits(load(tmp_path / "plain")), logits(model))
    with transformers_patched(False):
        assert not any(isinstance(m, ExpertFFN) for m in stock(tmp_path / "plain").modules())


def test_a_quantised_donor_is_converted_as_its_dequantised_self(tmp_path: Path) -> None:
    torch.manual_seed(0)
    build("llama", **SIZES).save_pretrained(tmp_path / "exact")
    stock(tmp_path / "exact", quantization_config=torchao()).save_pretrained(tmp_path / "donor")
    donor = load(tmp_path / "donor", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in donor.parameters()} == {torch.bfloat16}
    neurons = SIZES["intermediate_size"]
    before = logits(donor)
    permute_neurons(unfused_ffns(donor)[0], torch.arange(neurons).flip(0))
    torch.testing.assert_close(logits(donor), before, rtol=0.05, atol=0.05)
    attach_experts(donor, ON_DISK)
    save(donor, tmp_path / "model")
    assert expert_ffns(load(tmp_path / "model"))[0].division.neurons == neurons


def test_its_shapes_are_known_without_its_weights(tmp_path: Path) -> None:
    write(tmp_path, torchao)
    empty = load(tmp_path / "model", dtype=torch.float32, device="meta")
    whole = load(tmp_path / "model", dtype=torch.float32)
    shapes = {name: (one.shape, one.dtype) for name, one in whole.named_parameters()}
    assert {name: (one.shape, one.dtype) for name, one in empty.named_parameters()} == shapes
    assert not is_large(str(tmp_path / "model"), torch.float32)


def test_what_needs_plain_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, torchao)
    source = str(tmp_path / "model")
    with pytest.raises(ValueError, match=r"quantised \(torchao\), and cannot be read layer by"):
        load(source, part=Part(("model.layers.0", "model.layers.1")))
    with pytest.raises(ValueError, match=r"quantised \(torchao\), and cannot get a head: write"):
        load_classifier(source, ["a", "b"], dtype=torch.float32)


def test_a_quantiser_that_does_not_run_here_is_named(tmp_path: Path) -> None:
    config = build("llama").config
    config.quantization_config = {"quant_method": "higgs"}
    build("llama").save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantised \(higgs\), and cannot be dequantised here"):
        load(tmp_path)


def test_a_method_that_transformers_dequantises_is_left_to_it(tmp_path: Path) -> None:
    """fp8 in blocks, as DeepSeek's folders are."""
    torch.manual_seed(0)
    model = build("llama", **SIZES)
    model.config.quantization_config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [64, 64],
    }
    model.config.save_pretrained(tmp_path)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor
        if name.endswith("proj.weight"):
            blocks = tensor.unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            state[name] = (blocks / scale).reshape(tensor.shape).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    plain = load(tmp_path, dtype=torch.float32)
    assert not hasattr(plain.config, "quantization_config")
    name = "model.layers.0.mlp.up_proj.weight"
    exact = model.get_parameter(name)
    error = (plain.get_parameter(name) - exact).abs().max() / exact.abs().max()
    assert 0 < error <= 2**-4  # half of the last of three bits
