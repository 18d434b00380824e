"""What a converted folder can do in vLLM, and what was asked for: refused before anything is built.

Imports nothing of vLLM: a `VllmConfig` is read by its attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_tools.experts.conversion import Conversion, read_block
from moe_tools.inference.optimized import PACKED
from moe_tools.registry import unknown

KEY = "moe_tools"
"""The key of `--additional-config` that is ours."""
INSTEAD = "use moe_tools.load and transformers"


@dataclass(frozen=True)
class Options:
    """How FFNs run, e.g. {"moe_tools": {"optimize": true, "packed_dtype": "int8"}}."""

    optimize: bool = False
    """Packed for the kernels of moe-tools, which skip what is off (`moe_tools.optimize`)."""
    packed_dtype: str | None = None
    """A key of `PACKED`; None: that of the model."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the packed weights."""
        return None if self.packed_dtype is None else PACKED[self.packed_dtype]


def read_options(additional: Any) -> Options:
    """Our part of vLLM's `--additional-config`.

    Raises:
        ValueError: an unknown key or dtype, or a dtype of weights that are not packed.
    """
    given = additional.get(KEY, {}) if isinstance(additional, dict) else {}
    known = ("optimize", "packed_dtype")
    if not isinstance(given, dict):
        raise ValueError(f"{KEY} in --additional-config is {given!r}, but must be a mapping")
    for key in given:
        if key not in known:
            raise unknown(f"key of {KEY} in --additional-config", key, known)
    options = Options(**given)
    if not isinstance(options.optimize, bool):
        raise ValueError(f"optimize is {options.optimize!r}, but must be true or false")
    if options.packed_dtype is not None and options.packed_dtype not in PACKED:
        raise unknown("packed_dtype", str(options.packed_dtype), PACKED)
    if options.packed_dtype is not None and not options.optimize:
        raise ValueError(f'packed_dtype {options.packed_dtype} needs "optimize": true')
    return options


def checked_conversion(vllm_config: Any) -> Conversion:
    """What was done to the model that vLLM is to run.

    Raises:
        ValueError: moe-tools never touched it; or it, or what vLLM was asked for, cannot be right.
    """
    model = vllm_config.model_config
    conversion = read_block(model.hf_config)
    if conversion is None:
        raise ValueError(
            f"{model.model} has no moe_tools block in its config: leave --hf-overrides away"
        )
    for refused, why in (*_of_folder(conversion, model), *_of_engine(vllm_config)):
        if refused:
            raise ValueError(f"{model.model} cannot run in vLLM: {why}")
    return conversion


def _of_folder(conversion: Conversion, model: Any) -> list[tuple[bool, str]]:
    """Whether something of a folder is refused, and why."""
    config = model.hf_config
    return [
        (
            conversion.prompt_share is not None,
            f"it selects its neurons by the prompt (prompt_share {conversion.prompt_share}), which "
            f"would be one selection for all the sequences of a batch: {INSTEAD}",
        ),
        (
            bool(conversion.thresholds),
            "inputs of its linears have thresholds, and vLLM computes several linears of one input "
            f"in one: {INSTEAD}",
        ),
        (config.get_text_config() is not config, f"it takes more than text: {INSTEAD}"),
        (model.is_moe, f"its host is a mixture of experts itself: {INSTEAD}"),
    ]


def _of_engine(vllm_config: Any) -> list[tuple[bool, str]]:
    """Whether something that vLLM was asked for is refused, and why."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    return [
        (
            tensor > 1,
            f"tensor_parallel_size is {tensor}, but a routed FFN is whole on every device: "
            "leave it at 1, --data-parallel-size takes several devices",
        ),
        (
            pipeline > 1,
            f"pipeline_parallel_size is {pipeline}, which moe-tools does not know: leave it at 1, "
            "--data-parallel-size takes several devices",
        ),
        (
            vllm_config.quant_config is not None,
            f"its weights are quantised ({model.quantization}), which is not tested in vLLM: leave "
            f"--quantization away; for a quantised folder, {INSTEAD}",
        ),
        (
            vllm_config.lora_config is not None,
            "its routers do not see what LoRA adds: merge the adapter, leave --enable-lora away",
        ),
        (
            model.convert_type != "none",
            f"--convert {model.convert_type} is not tested with routers: {INSTEAD}",
        ),
    ]
