"""Loads a model from a folder, a hub id or a GGUF file, without pickle.

A converted folder is a dense Hugging Face folder (the stock class loads it) with `router.*`
tensors beside the host's and a `moe_tools` block in `config.json`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.broken import named_errors, reason
from moe_tools.checkpoint.class_names import stock_class
from moe_tools.checkpoint.parts import Part
from moe_tools.checkpoint.plain import made_plain, quantised_by, shapes
from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.checkpoint.rebuild import check_rebuilt
from moe_tools.checkpoint.remote_code import is_trusted, trusted
from moe_tools.checkpoint.sizes import check_counts, room, sized
from moe_tools.checkpoint.stored import some, stored_tensors
from moe_tools.data.tasks import Task
from moe_tools.experts.conversion import read_block
from moe_tools.extras import needed
from moe_tools.hosts.dequantise import dequantise
from moe_tools.inference.optimized import optimize as optimize_model
from moe_tools.names import CONFIG

MAGIC = b"GGUF"
"""How such a file begins."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def is_classifier(model: nn.Module) -> bool:
    """Whether a model classifies whole texts."""
    return type(model).__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()


def is_classifier_source(source: str) -> bool:
    """Whether a folder or hub id holds a classifier, by its config; without one, it does not."""
    if Path(source).suffix == ".gguf":
        return False
    try:
        with named_errors(""):
            config = read_config(source)
    except ValueError:
        return False
    return host_class(config).__name__ in (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())


def regresses(model: nn.Module) -> bool:
    """Whether a classifier has one output, which is then a score and no class."""
    config: Any = model.config
    return is_classifier(model) and config.num_labels == 1


def task_of(source: str) -> Task:
    """What a folder or hub id is made for, by its config: `lm` where the head says nothing else.

    An encoder-decoder is `lm`, too: what its texts are, its config does not know.
    """
    if not is_classifier_source(source):
        return "lm"
    return "regress" if read_config(source).num_labels == 1 else "classify"


def is_quantised_source(source: str) -> bool:
    """Whether a quantiser wrote the weights of a folder or hub id, by its config."""
    return quantised_by(read_config(source)) is not None


def prompt_share(source: str) -> float | None:
    """The share of the neurons that a folder or hub id runs after a prompt; None: it selects none.

    Raises:
        ValueError: nothing there.
    """
    if Path(source).suffix == ".gguf":
        return None
    with named_errors(f"cannot load {source}: "):
        conversion = read_block(read_config(source))
    return None if conversion is None else conversion.prompt_share


def load_classifier(
    source: str, labels: Sequence[str], *, dtype: torch.dtype, device: str = "cpu"
) -> transformers.PreTrainedModel:
    """Loads a dense model as a classifier of `labels`, with a fresh, random head if it has none.

    Raises:
        ValueError: nothing there, a tensor of the body is missing, a classifier of other labels,
            or an architecture that transformers has no classifier of.
    """
    if is_classifier_source(source):
        model = load(source, dtype=dtype, device=device)
        if model.config.num_labels != len(labels):
            raise ValueError(
                f"{source} tells {model.config.num_labels} classes apart, but the data has "
                f"{len(labels)} labels: {some(labels)}"
            )
        return model
    names = dict(enumerate(labels))
    numbers = {name: index for index, name in names.items()}
    return _with_head(source, dtype, device, id2label=names, label2id=numbers)


def load_regressor(
    source: str, *, dtype: torch.dtype, device: str = "cpu"
) -> transformers.PreTrainedModel:
    """Loads a dense model that gives a text one score, with a fresh, random head if it has none.

    Its config says `problem_type: regression`.

    Raises:
        ValueError: nothing there, a tensor of the body is missing, a classifier, or an architecture
            that transformers has no classifier of.
    """
    if not is_classifier_source(source):
        return _with_head(source, dtype, device, num_labels=1, problem_type="regression")
    model = load(source, dtype=dtype, device=device)
    if not regresses(model):
        raise ValueError(
            f"{source} tells {model.config.num_labels} classes apart, and a regression gives one "
            "score: use task: classify, or give a model without a head"
        )
    model.config.problem_type = "regression"
    return model


def _with_head(
    source: str, dtype: torch.dtype, device: str, **head: Any
) -> transformers.PreTrainedModel:
    method = quantised_by(read_config(source))
    if method is not None:
        raise ValueError(
            f"{source} is quantised ({method}), and cannot get a head: write it out as "
            "moe_tools.load gives it, which is dequantised, and start from there"
        )
    named = named_errors(f"cannot load {source}: ")
    with quiet_transformers(), transformers_patched(True), named:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source,
            dtype=dtype,
            **head,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=is_trusted(),
        )
    prefix = f"{model.base_model_prefix}."  # a pooler stands before the head, and is new with it
    missing = {key for key in report["missing_keys"] if key.startswith(prefix)}
    body = {key for key in missing if not key.startswith(f"{prefix}pooler.")}
    if body:
        raise ValueError(f"{source} lacks the tensors {some(body)}")
    check_rebuilt(model, source)
    return model.to(device).eval()


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    routed: bool = True,
    optimize: bool = False,
    part: Part | None = None,
    trust_remote_code: bool = False,
) -> transformers.PreTrainedModel:
    """Loads a dense or converted model: a folder, a hub id or a GGUF file.

    Args:
        source: where the model is.
        dtype: of the host's weights; None keeps the dtype they were saved in. Routers stay fp32.
        device: where to put it; `meta` reads no weights of a folder or hub id, and checks all else.
        routed: False leaves routers and selection by the prompt out: the dense model of the same
            weights.
        optimize: for the sparse kernels, see `moe_tools.optimize`.
        part: the only part to read, of a folder or hub id; one without FFNs stays dense.
        trust_remote_code: lets Python code that comes with the model run.

    Raises:
        ValueError: nothing there, nothing to optimise, a missing or truncated shard, a tensor that
            is missing (a router too: it is never replaced by a random one) or of another shape
            than `config.json` says, or an unknown format.
    """
    path = Path(source)
    with quiet_transformers(), transformers_patched(True), trusted(trust_remote_code):
        if path.suffix == ".gguf":
            model = _load_gguf(path, dtype)
        else:
            empty = torch.device("meta") if device == "meta" else nullcontext()
            with empty:  # routers are made empty, too
                model = _load_folder(str(source), dtype, routed, device, part)
    model = model.to(device).eval()  # type: ignore[arg-type]
    return optimize_model(model) if optimize else model


def load_tokenizer(source: str | Path) -> transformers.PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to a model source.

    Raises:
        ValueError: the source has none.
    """
    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
        # transformers 5 would invent an empty one for some families
        raise ValueError(f"{source} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    try:
        with quiet_transformers():
            if (path / CONFIG).is_file():  # transformers reads it for the kind of tokenizer
                check_config(str(source))
            if path.suffix == ".gguf":
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            else:
                trust = is_trusted()
                tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust)
            tokenizer("a")  # its settings are of the right kind, too
            return tokenizer
    except Exception as error:
        raise ValueError(f"{source} has no tokenizer: {reason(error)}") from error


def _load_gguf(path: Path, dtype: torch.dtype | None) -> transformers.PreTrainedModel:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a GGUF file, a model folder or a hub id")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:  # what transformers says differs by version
            raise ValueError(f"{path} is not a GGUF file")
    needed("gguf", "gguf", str(path))
    checked = named_errors(f"cannot load {path}: "), sized(str(path), room({path}, quantised=True))
    # transformers draws a bar that nothing turns off
    with checked[0], checked[1], redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype or torch.float32,
            **_dequantized(),
        )


def read_config(source: str) -> Any:
    """The config of a folder or hub id."""
    check_config(source)
    return AutoConfig.from_pretrained(source, trust_remote_code=is_trusted())


def check_config(source: str) -> None:
    """Checks the config of a folder or hub id as plain data, see `check_counts`."""
    check_counts(PreTrainedConfig.get_config_dict(source)[0], f"the config of {source}")


def _dequantized() -> dict[str, Any]:
    """The argument that gives plain weights; before `GgufConfig`, transformers knew no others."""
    if not hasattr(transformers, "GgufConfig"):  # it began with 5.17
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _load_folder(
    source: str, dtype: torch.dtype | None, routed: bool, device: str, part: Part | None
) -> transformers.PreTrainedModel:
    place, files = "no such folder, and as a hub id: ", None
    if Path(source).is_dir():
        # names what is truncated, which transformers would not
        place, files = "", {*stored_tensors(Path(source)).values()}
    with named_errors(f"cannot load {source}: {place}"):
        config = read_config(source)
    conversion = read_block(config)
    if conversion is not None:
        wanted = conversion if routed else conversion.unrouted()
        kept = wanted if part is None else part.of_conversion(wanted)
        config.moe_tools = None if kept is None else kept.to_dict()
    host: Any = host_class(config) if part is None else part.of(host_class(config))
    method = quantised_by(config)
    if method is not None:
        if part is not None:
            raise ValueError(
                f"{source} is quantised ({method}), and cannot be read layer by layer: write it "
                "out as moe_tools.load gives it, which is dequantised, and start from there"
            )
        if device == "meta":
            return shapes(config, host, dtype)
    most = None if files is None else room(files, quantised=method is not None)
    named = named_errors(f"cannot load {source}: {place}")
    with made_plain(source, config), named, sized(source, most):
        model, report = host.from_pretrained(
            source,
            config=config,
            dtype=dtype or "auto",
            device_map={"": "meta"} if device == "meta" else None,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
            **({"trust_remote_code": is_trusted()} if host is AutoModelForCausalLM else {}),
        )
    if report["mismatched_keys"]:
        key, shape, expected = min(report["mismatched_keys"])
        raise ValueError(f"{source}: {key} is {tuple(shape)}, expected {tuple(expected)}")
    if report["missing_keys"]:
        raise ValueError(f"{source} lacks the tensors {some(report['missing_keys'])}")
    check_rebuilt(model, source)
    if method is not None:
        with made_plain(source, config):
            dequantise(model, dtype or model.dtype)
    return model


def host_class(config: Any) -> type[transformers.PreTrainedModel]:
    """The stock class that the folder was saved from."""
    said = getattr(config, "architectures", None)
    names = [stock_class(name) for name in said] if isinstance(said, list) else []
    if len(names) == 1 and isinstance(getattr(transformers, names[0], None), type):
        return getattr(transformers, names[0])
    return AutoModelForCausalLM  # type: ignore[return-value]
