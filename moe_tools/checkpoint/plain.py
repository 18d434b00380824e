"""A folder that a quantiser wrote, read as a plain model: steps work on numbers, not on codes.

transformers dequantises while it loads, by the methods that it can; of the others it loads the
quantised model, whose linears `moe_tools.hosts.dequantise` then replaces.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from moe_tools.checkpoint.broken import BrokenFolder, reason
from moe_tools.checkpoint.rebuild import add_modules
from moe_tools.checkpoint.remote_code import is_trusted
from moe_tools.experts.conversion import read_block


def quantised_by(config: Any) -> str | None:
    """The method that the weights of a folder are quantised by, as its config says; None: none."""
    found = _said(config)
    return None if found is None else str(found.get("quant_method"))


def _said(config: Any) -> dict[str, Any] | None:
    given = getattr(config, "quantization_config", None)
    return given if given is None or isinstance(given, dict) else given.to_dict()


@contextmanager
def made_plain(source: str, config: Any) -> Iterator[None]:
    """While it lasts, a quantised folder is loaded; says in one line what its quantiser lacks here.

    Raises:
        ValueError: the quantiser does not run.
    """
    found = _said(config)
    if found is None:
        yield
        return
    method = AUTO_QUANTIZATION_CONFIG_MAPPING.get(found.get("quant_method", ""))
    if method is not None and "dequantize" in inspect.signature(method).parameters:
        config.quantization_config = found | {"dequantize": True}
    try:
        yield
    except BrokenFolder:
        raise
    except (ImportError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} is quantised ({quantised_by(config)}), and cannot be dequantised here "
            f"({reason(error)}): give the model that it was made from"
        ) from error


def shapes(config: Any, host: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """A quantised model as it will be once it is dequantised, on the meta device.

    Args:
        config: of the folder; it is changed.
        host: the class of the model.
        dtype: of the weights; None: as the config says.
    """
    del config.quantization_config
    dtype = dtype or config.dtype or torch.float32
    conversion = read_block(config)
    model: PreTrainedModel
    if host is AutoModelForCausalLM:
        model = host.from_config(config, dtype=dtype, trust_remote_code=is_trusted())
    else:
        model = host._from_config(config, dtype=dtype)
    if conversion is not None:
        add_modules(model, conversion)
    return model
