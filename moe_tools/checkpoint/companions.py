"""The files of a donor that no model and no tokenizer writes, but somebody reads.

Processors of pictures, tokenizers of other programs (`tokenizer.model`, `tekken.json`), the modules
of sentence-transformers, licences. Without them a converted folder could not stand in its donor's
place.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

from moe_tools.names import CONFIG, FIGURES, METRICS, SWEEP

logger = logging.getLogger(__name__)

KEPT = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""What stands beside the weights."""
OF_THE_DONOR = (
    CONFIG,
    METRICS,
    FIGURES,
    SWEEP,
    "*.index.json",  # which shard holds which tensor
    "adapter_config.json",  # names adapters that are merged
    "params.json",  # describes weights in a format of Mistral's own
    "quantize_config.json",
    "trainer_state.json",
    "all_results.json",
)
"""What describes the donor's own weights, and would be wrong beside others."""
MODULES = "modules.json"
"""Where sentence-transformers lists the folders that a text passes."""


def companions(source: str) -> dict[Path, Path]:
    """Where such files of a folder or hub id stand in a model folder -> the file."""
    place = _folder_of(source)
    return {} if place is None else {file.relative_to(place): file for file in _inside(place)}


def put_beside(files: Mapping[Path, Path], folder: Path) -> None:
    """Copies `companions` into a model folder; what is there already stays."""
    for name, file in files.items():
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _folder_of(source: str) -> Path | None:
    """Where the files are; None: a GGUF file, which is all by itself."""
    if Path(source).suffix == ".gguf":
        return None
    if Path(source).is_dir():
        return Path(source)
    try:  # without a network it is what was fetched before
        return Path(snapshot_download(source, allow_patterns=[*KEPT, "*/config.json"]))
    except (OSError, ValueError) as error:
        logger.warning("%s: only its model and its tokenizer are kept: %s", source, error)
        return None


def _inside(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        kept = any(fnmatch(file.name, pattern) for pattern in KEPT)
        if file.is_file() and kept and not any(fnmatch(file.name, each) for each in OF_THE_DONOR):
            yield file
    for module in _modules(folder):
        yield from sorted(file for file in module.rglob("*") if file.is_file())


def _modules(folder: Path) -> list[Path]:
    """Folders of sentence-transformers' modules; the first one is the model itself."""
    try:
        listed = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        names = [str(module["path"]) for module in listed]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    inside = [(folder / name).resolve() for name in names if name]
    root = folder.resolve()
    return [folder / each.relative_to(root) for each in inside if root in each.parents]
