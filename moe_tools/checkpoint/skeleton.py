"""Builds a model without weights, on the meta device, from `config.json` alone."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.broken import named_errors
from moe_tools.checkpoint.loading import host_class, is_classifier, read_config
from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.checkpoint.rebuild import add_modules
from moe_tools.checkpoint.remote_code import is_trusted
from moe_tools.checkpoint.sizes import sized
from moe_tools.data.tasks import HEADS, Task
from moe_tools.experts.conversion import read_block


def skeleton(
    source: str, *, dtype: torch.dtype = torch.bfloat16, task: Task = "lm"
) -> PreTrainedModel:
    """Builds the model that `load` would give, with shapes and dtypes but no numbers.

    It takes next to no memory.

    Args:
        source: a folder with a `config.json`, a hub id or a GGUF file.
        dtype: of the host's weights. Routers stay fp32.
        task: one of a head on the body makes it a classifier, its head new where it has none.

    Raises:
        ValueError: no config there, or one that no model can be built from.
    """
    with quiet_transformers(), named_errors(f"cannot read the config of {source}: "):
        config = _config(source)
    conversion = read_block(config)
    with quiet_transformers(), torch.device("meta"), transformers_patched(True):
        with named_errors(f"cannot build a model from the config of {source}: "), sized(source):
            model = _build(config, task)
        model = model.to(dtype)  # type: ignore[arg-type]
        if conversion is not None:
            add_modules(model, conversion)
    return model.eval()


def _config(source: str) -> Any:
    path = Path(source)
    if path.suffix != ".gguf":
        return read_config(source)
    now = path.stat() if path.exists() else None
    file = None if now is None else (now.st_ino, now.st_mtime_ns, now.st_size)
    return copy.deepcopy(_gguf_config(path, file))


@lru_cache(maxsize=1)
def _gguf_config(path: Path, _: tuple[int, int, int] | None) -> Any:
    """The config of a file as it is now. Its vocabulary is read with it, which takes seconds."""
    return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def _build(config: Any, task: Task) -> PreTrainedModel:
    host: Any = host_class(config)
    made: PreTrainedModel = (
        host.from_config(config, trust_remote_code=is_trusted()) if _is_auto(host) else host(config)
    )
    if task in HEADS and not is_classifier(made):
        if task == "regress":
            config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config)
    return made


def _is_auto(host: type[Any]) -> bool:
    return not issubclass(host, PreTrainedModel)
