"""The model card of a converted folder: what it is, how it was made and measured, how to run it.

A card is a function of the folder's other files, so it can be written again whenever one of them
changes: `config.json`, `recipe.yaml`, `metrics.json` and `figures.json`, which
`moe-tools evaluate --card` leaves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from moe_tools.atomic import new_file
from moe_tools.checkpoint.class_names import only_ours
from moe_tools.data.sources import shortened
from moe_tools.experts.conversion import Conversion
from moe_tools.names import CONFIG, FIGURES, METRICS, README, RECIPE
from moe_tools.thresholds.rows import input_sparsity, read_rows

MARK = "<!-- Written by moe-tools, which may write it again. -->"
"""A mark in every card that moe-tools wrote; a card without it was written by someone else."""
HEADS: dict[str, tuple[str, str | None]] = {
    "Classification": ("AutoModelForSequenceClassification", "text-classification"),
    "MaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ConditionalGeneration": ("AutoModelForSeq2SeqLM", None),
    "": ("AutoModelForCausalLM", "text-generation"),
}
"""Part of the name of a stock class -> its Auto class and its task, the first that fits."""

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""A hub id: owner/name."""

UNUSUAL = re.compile(r"[^\w .,+=@-]+")
"""What a name of a file may say to Markdown, HTML or a shell: it becomes one underscore."""

_LOAD = """```python
import moe_tools  # from here on transformers knows what this folder is
from transformers import {auto}

model = {auto}.from_pretrained("{place}")
```"""

_ELSEWHERE = (
    "Programs other than transformers (llama.cpp, vLLM) refuse its class by name; "
    "`moe-tools export` says what it can write for them."
)


def write_card(folder: Path, train_tokens: int | None = None) -> None:
    """Writes `README.md`; nothing for a model that moe-tools did not convert.

    `train_tokens` is for a run whose `metrics.json` is not there yet.

    Raises:
        ValueError: there is a card that moe-tools did not write.
    """
    config = _read(folder / CONFIG)
    if config.get("moe_tools") is not None:
        check_card(folder)
        with new_file(folder / README) as partial:
            partial.write_text(str(card(folder, config, train_tokens)), encoding="utf-8")


def check_card(folder: Path) -> None:
    """Checks that moe-tools can write the card of a folder.

    Raises:
        ValueError: it holds no converted model, or a card that moe-tools did not write.
    """
    if _read(folder / CONFIG).get("moe_tools") is None:
        raise ValueError(f"{folder} holds no converted model, so moe-tools has no card for it")
    readme = folder / README
    if readme.is_file() and MARK not in readme.read_text(encoding="utf-8"):
        raise ValueError(f"{readme} was written by someone else: move it away first")


def card(folder: Path, config: dict[str, Any], train_tokens: int | None = None) -> ModelCard:
    """The card of a folder with this `config.json`, its metadata as the hub wants them."""
    conversion = Conversion.from_dict(config["moe_tools"])
    auto, task = _head(config)
    data = ModelCardData(
        library_name="transformers",
        base_model=conversion.donor if is_hub_id(conversion.donor) else None,
        pipeline_tag=task,
        tags=["moe-tools", "activation-sparsity"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n{MARK}\n",
        f"# {public_name(conversion.donor)}, converted by moe-tools",
        _what(conversion),
        _how_to_load(conversion, auto),
        _figures(folder),
        _recipe(folder, conversion, train_tokens),
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n")


def _what(conversion: Conversion) -> str:
    said = [f"Made from `{public_name(conversion.donor)}`."]
    if conversion.activation is not None:
        said.append(f"Its FFNs have the activation `{conversion.activation['kind']}`.")
    if conversion.expert_size is not None:
        said.append(f"The neurons of every FFN are ordered in experts of {conversion.expert_size}.")
    if conversion.router is not None:
        kind = (conversion.selector or {}).get("kind")
        said.append(
            f"A router (`{conversion.router}`) scores the experts for every token, and a selector "
            f"(`{kind}`) decides which of them run."
        )
    if conversion.prompt_share is not None:
        said.append(
            "Its weights are unchanged: every neuron runs on the prompt, and after it the "
            f"{conversion.prompt_share:.0%} that mattered there (GRIFFIN, arXiv 2404.01365)."
        )
    if conversion.thresholds is not None:
        dropped = input_sparsity(read_rows(conversion))
        said.append(
            f"Small inputs of {len(conversion.thresholds)} groups of linears are dropped: "
            f"{dropped:.0%} of them on calibration text, each counted by the weights that it reads."
        )
    return " ".join(said)


def _how_to_load(conversion: Conversion, auto: str) -> str:
    load = _LOAD.format(auto=auto, place="PATH_OR_HUB_ID")
    if conversion.stock_activation is not None:
        without = "Without moe-tools it does not load: no stock class knows its activation."
    elif conversion.router is not None:
        without = (
            "**Without `import moe_tools` the same folder is a dense model**: the routers are left "
            "out, every expert runs, and nothing is saved."
        )
        if conversion.constants:
            without += " Its weights are fitted to the routers' masks: it is worse than its donor."
    elif conversion.prompt_share is not None:
        without = (
            "**Without `import moe_tools` the same folder is the dense model**: every neuron runs, "
            "and nothing is saved. Without a KV cache (`use_cache=False`), too."
        )
    elif conversion.thresholds is not None:
        without = (
            "**Without `import moe_tools` the same folder is a dense model**: the thresholds are "
            "left out, and every input is read."
        )
    elif conversion.activation is not None:
        without = "It is a dense model, and transformers loads it without moe-tools just as well."
    else:
        without = "It is a dense model, and loads without moe-tools just as well."
    if only_ours(conversion.to_dict()):
        without += f" {_ELSEWHERE}"
    commands = 'moe-tools generate FOLDER --prompt "The sea is"\nmoe-tools evaluate FOLDER'
    return f"## How to run it\n\n{load}\n\n{without}\n\n```\n{commands}\n```"


def _figures(folder: Path) -> str:
    rows: Sequence[dict[str, Any]] = _read(folder / FIGURES, [])
    if not rows:
        return ""
    first = rows[0]
    measure = "perplexity" if first["accuracy"] is None else "accuracy"
    measure = "pearson" if first["perplexity"] is None else measure  # of a regression
    columns = f"| model | {measure} | FFN sparsity | FFN bytes a token | FFN FLOPs |"
    lines = [columns, "|---|---|---|---|---|", *(_line(row, measure) for row in rows)]
    fingerprint = f"; text {first['text']}" if first.get("text") else ""
    text = (
        f"{first['tokens']:,} {_tokens(first)} of "
        f"{first['block_length']}{_stride(first)}, {first['dtype']} on {first['device']}"
        f"{fingerprint}. "
        "Bytes and FLOPs: over those of the dense FFNs in bf16, routers included."
    )
    return "## Figures\n\n" + "\n".join(lines) + f"\n\n{text}"


def _tokens(row: dict[str, Any]) -> str:
    source = f"`{shortened(row['data'])}`"
    if row.get("protocol"):  # rows of older versions have none
        return f"tokens of {row['protocol']} from {source}, windows"
    return f"held-out tokens of {source}, blocks"


def _stride(row: dict[str, Any]) -> str:
    return f" at a stride of {row['stride']}" if row.get("stride") else ""


def _line(row: dict[str, Any], measure: str) -> str:
    roles = {"donor": "dense donor", "control": "dense control, trained on the same tokens"}
    title, off = roles.get(row["role"], "converted"), row["ffn_sparsity"]
    read = row.get("ffn_bytes_share")  # rows of older versions have none
    figures = ["-" if share is None else f"{share:.2f}x" for share in (read, row["ffn_share"])]
    quality = row["tasks"].get(measure) if measure == "pearson" else row[measure]
    said = "-" if quality is None else f"{quality:.4g}"
    return f"| {title} | {said} | {off:.1%} | {' | '.join(figures)} |"


def _recipe(folder: Path, conversion: Conversion, train_tokens: int | None) -> str:
    file = folder / RECIPE
    if not file.is_file():
        return ""
    block = yaml.safe_load(file.read_text(encoding="utf-8"))
    if "data" in block:
        block["data"] = shortened(block["data"])
    recipe, donor = yaml.safe_dump(block, sort_keys=False).strip(), public_name(conversion.donor)
    longest = max(map(len, re.findall("`+", recipe)), default=0)
    fence = "`" * max(3, longest + 1)  # no line of the recipe ends it
    tokens = _read(folder / METRICS).get("train_tokens", train_tokens)
    trained = "" if tokens is None else f"Trained on {tokens:,} tokens. "
    command = f"moe-tools convert --recipe recipe.yaml --model {donor} --output DIR"
    return (
        f"## How it was made\n\n{trained}The recipe, every default spelled out:\n\n"
        f"{fence}yaml\n{recipe}\n{fence}\n\n```\n{command}\n```"
    )


def _head(config: dict[str, Any]) -> tuple[str, str | None]:
    """The Auto class of the model that was saved, and what the hub calls its task."""
    name = (config.get("architectures") or [""])[0]
    return next(found for part, found in HEADS.items() if part in name)


def is_hub_id(donor: str) -> bool:
    """Whether a donor is named by its hub id."""
    return HUB_ID.fullmatch(donor) is not None and not Path(donor).exists()


def public_name(source: str) -> str:
    """A hub id as it is, or the last part of a path: the rest is private."""
    return source if is_hub_id(source) else UNUSUAL.sub("_", Path(source).name)


def _read(file: Path, default: Any = None) -> Any:
    """The JSON in a file; the default, or an empty object, where there is none."""
    missing = {} if default is None else default
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else missing
