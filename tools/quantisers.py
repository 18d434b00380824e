"""Measures a routed model under every quantiser that is installed: rows of a table.

    python tools/quantisers.py

A tiny random llama with routers and a mean for what is off; in fp32, on the CPU, but for what the
quantiser does. Quantisers are other packages: bitsandbytes, optimum-quanto, hqq, torchao.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.checkpoint.saving import save
from moe_tools.experts.conversion import Conversion, attach_experts
from moe_tools.experts.experts import every_expert_on, expert_ffns

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
CONVERSION = Conversion("donor", 32, "sigmoid", {"kind": "threshold", "tau": 0.5}, when_off="mean")
Change = Callable[[nn.Module], None]


def _torchao(name: str, **options: Any) -> Any:
    known = import_module("torchao.quantization")
    return transformers.TorchAoConfig(getattr(known, name)(**options))


def _four_bits() -> Any:
    groups = import_module("torchao.quantization.granularity").PerGroup(32)
    codes = vars(torch)["int4"]
    return _torchao("IntxWeightOnlyConfig", weight_dtype=codes, granularity=groups)


def _hqq(bits: int) -> Change:
    def change(model: nn.Module) -> None:
        known = import_module("hqq.core.quantize")
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and path != "lm_head":
                config = known.BaseQuantizeConfig(nbits=bits, group_size=64)
                made = known.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
                model.set_submodule(path, made)

    return change


AT_LOAD: dict[str, Callable[[], Any]] = {
    "bitsandbytes, 8 bits": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes, nf4": lambda: transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4"
    ),
    "torchao, int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao, int8, activations too": lambda: _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao, int4": _four_bits,
    "torchao, fp8": lambda: _torchao("Float8WeightOnlyConfig"),
    "quanto, int8": lambda: transformers.QuantoConfig(weights="int8"),
    "quanto, int4": lambda: transformers.QuantoConfig(weights="int4"),
}
AFTER_LOAD: dict[str, Change] = {"hqq, 8 bits": _hqq(8), "hqq, 4 bits": _hqq(4)}


def _load(folder: Path, **options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def _quantised(folder: Path, config: Callable[[], Any]) -> LlamaForCausalLM:
    return _load(folder, quantization_config=config())


def _changed(folder: Path, change: Change) -> LlamaForCausalLM:
    model = _load(folder)
    change(model)
    return model


def _makers(folder: Path) -> dict[str, Callable[[], nn.Module]]:
    made: dict[str, Callable[[], nn.Module]] = {
        name: partial(_quantised, folder, config) for name, config in AT_LOAD.items()
    }
    return made | {name: partial(_changed, folder, one) for name, one in AFTER_LOAD.items()}


@torch.no_grad()
def _write(folder: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, num_attention_heads=4, initializer_range=0.1, **SIZES)
    ).eval()
    for ffn in attach_experts(model, CONVERSION):
        assert ffn.off_F is not None
        ffn.off_F.normal_(0, 0.05)
        ffn.router.get_parameter("weight").normal_(0, 1 / 32)
        ffn.router.get_parameter("bias").normal_()
    save(model, folder)


@torch.no_grad()
def _logits(model: nn.Module, masks: dict[str, Tensor] | None = None) -> Tensor:
    """Logits; with masks, under these, and the masks of a name that is not there are kept."""
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
    for ffn in expert_ffns(model) if masks is not None else []:
        assert masks is not None
        ffn.interventions.append(partial(masks.setdefault, ffn.name))
    found: Tensor = model(ids).logits.float()
    for ffn in expert_ffns(model):
        ffn.interventions.clear()
    return found


def main() -> None:
    """Prints a row for each quantiser, or why it does not run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        _write(folder)
        masks: dict[str, Tensor] = {}
        routed = _logits(_load(folder), masks)
        with transformers_patched(False):
            dense = _logits(_load(folder))
        print(f"| logits to {dense.abs().max():.1f} | stock class | routed | every expert on |")
        print("|---|---|---|---|")
        for quantiser, make in _makers(folder).items():
            print(_row(quantiser, make, dense, routed, masks))


def _row(
    name: str,
    make: Callable[[], nn.Module],
    dense: Tensor,
    routed: Tensor,
    masks: dict[str, Tensor],
) -> str:
    try:
        with transformers_patched(False):
            stock = _logits(make())
        model = make()
    except Exception as error:  # not installed, or not for this machine
        return f"| {name} | {type(error).__name__}: {str(error).splitlines()[0]} | | |"
    with every_expert_on(model):
        apart = _difference(_logits(model), stock)
    errors = _difference(stock, dense), _difference(_logits(model, masks), routed)
    return f"| {name} | {errors[0]:.3f} | {errors[1]:.3f} | {apart:.1g} |"


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with quiet_transformers():
        main()
