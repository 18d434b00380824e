"""Converted models in the formats of other programs: a format is a planner, a file each."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_tools.atomic import check_free, new_file, new_folder
from moe_tools.checkpoint.auto import transformers_patched
from moe_tools.checkpoint.loading import host_class, load_tokenizer
from moe_tools.data import blocks
from moe_tools.data.sources import shortened
from moe_tools.export.card import write_export_card
from moe_tools.export.check import Figures, check
from moe_tools.export.dense import plan_dense
from moe_tools.export.gguf import plan_gguf
from moe_tools.export.moe import plan_moe
from moe_tools.export.plan import Options, Plan, Planner
from moe_tools.export.powerinfer import plan_powerinfer
from moe_tools.export.source import Source
from moe_tools.names import README
from moe_tools.registry import Registry

logger = logging.getLogger(__name__)

__all__ = ["TARGETS", "Checking", "Exported", "Options", "Plan", "export"]

TARGETS: Registry[Planner] = Registry(
    "export format",
    {"dense": plan_dense, "moe": plan_moe, "gguf": plan_gguf, "powerinfer": plan_powerinfer},
)
EXPORT = "export.json"
"""What was written and how it compares; beside a file `OUT` it is `OUT.export.json`."""


@dataclass(frozen=True)
class Checking:
    """On what an export is compared with its source."""

    data: str = "docs"
    """Source of the text, which is its held-out part."""
    tokens: int = 2048
    length: int = 256
    """Tokens of a block, at most."""


@dataclass(frozen=True)
class Exported:
    """What was planned, and how it compares."""

    target: str
    facts: dict[str, Any]
    figures: Figures | None = field(default=None)
    """None: not checked."""

    def lines(self) -> list[str]:
        """What a user reads."""
        said = [f"{name}: {value}" for name, value in {"format": self.target, **self.facts}.items()]
        return said if self.figures is None else said + self.figures.lines()

    def to_dict(self) -> dict[str, Any]:
        """The content of `export.json`."""
        checked = None if self.figures is None else self.figures.to_dict()
        return {"format": self.target, **self.facts, "check": checked}


AS_IT_IS, CHECKING = Options(), Checking()


def export(
    source: str | Path,
    output: str | Path,
    *,
    to: str = "dense",
    options: Options = AS_IT_IS,
    checking: Checking | None = CHECKING,
    dry_run: bool = False,
) -> Exported:
    """Writes a model in another program's format, and compares what was written with it.

    Args:
        source: folder or hub id.
        output: a new folder, or a new file; nothing that is there is overwritten.
        to: a name in `TARGETS`.
        options: what the format leaves open.
        checking: on what it is compared; None: not at all.
        dry_run: plan it, and write nothing.

    Raises:
        ValueError: an unknown format, an output that exists, a model that the format cannot say,
            or a written model that computes another one: then nothing is kept.
    """
    planner = TARGETS[to]
    target = Path(output)
    with transformers_patched(True):
        read = Source.read(str(source))
        plan = planner(read, options)
        _check_free(plan, target)
        if dry_run:
            return Exported(to, plan.facts())
        text = _tokens(read, checking) if checking and plan.compared else None
        with _new(plan, target) as place:
            plan.write(read, place)
            figures = None if text is None else check(plan, read, options, place, *text)
            done = Exported(to, plan.facts(), figures)
            _write_notes(read, plan, done, place, target)
    return done


def _write_notes(source: Source, plan: Plan, done: Exported, place: Path, target: Path) -> None:
    """What was written, and how it compares: as JSON, and in the card of a folder that has none."""
    note = _beside(target) if plan.is_file else place / EXPORT
    with new_file(note) as partial:
        partial.write_text(json.dumps(done.to_dict(), indent=2) + "\n", encoding="utf-8")
    if not plan.is_file and not (place / README).exists():
        write_export_card(source, done.facts, done.figures, place)


def _check_free(plan: Plan, target: Path) -> None:
    """Checks, before the work, that nothing is where the export and its figures go.

    Raises:
        ValueError: something is there.
    """
    check_free(target)
    if plan.is_file:
        if target.is_dir():
            raise ValueError(f"{target} is a folder, and one file is written: name a new file")
        check_free(_beside(target))


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.{EXPORT}")


def _new(plan: Plan, target: Path) -> AbstractContextManager[Path]:
    return new_file(target) if plan.is_file else new_folder(target)


def _tokens(source: Source, checking: Checking) -> tuple[Tensor, str | None] | None:
    """ids_BT of the check, and where they are from; None: a model that predicts no next token."""
    if host_class(source.config).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        logger.warning("%s is no causal language model: not compared", source.name)
        return None
    config = source.config.get_text_config()
    length = min(checking.length, getattr(config, "max_position_embeddings", checking.length))
    try:
        tokenizer = load_tokenizer(source.name)
    except ValueError:
        logger.warning("%s has no tokenizer: checked on random tokens", source.name)
        count = max(1, checking.tokens // length)
        draw = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (count, length), generator=draw), None
    ids_BT = blocks(
        checking.data, tokenizer, split="heldout", length=length, tokens=checking.tokens
    )
    return ids_BT, shortened(checking.data)
