"""Hooks of mkdocs: pages that the code writes, and a table of contents of the pages there are."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from moe_tools.cli.main import VERBS, _Parser

GENERATED = ("commands.md",)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leaves out of the table of contents what nobody has written yet."""
    config.nav = _existing(config.nav, Path(config.docs_dir))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the command line's page, from the parsers themselves."""
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def commands() -> str:
    """What `moe-tools VERB --help` says, of every verb."""
    parts = ["# Command line\n\n`moe-tools VERB --help` prints the same."]
    for verb in VERBS:
        module = import_module(f"moe_tools.cli.{verb}")
        parser = _Parser(prog=f"moe-tools {verb}")
        module.add_arguments(parser)
        parts.append(f"## {verb}\n\n{module.SUMMARY}\n\n```text\n{parser.format_help()}```")
    return "\n\n".join(parts) + "\n"


def _existing(entry: Any, docs: Path) -> Any:
    if isinstance(entry, list):
        kept = [_existing(each, docs) for each in entry]
        return [each for each in kept if each]
    if isinstance(entry, dict):
        ((title, below),) = entry.items()
        found = _existing(below, docs)
        return {title: found} if found else None
    return entry if entry in GENERATED or (docs / entry).is_file() else None
