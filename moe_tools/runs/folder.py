"""The folder of a run: what is in it, whose it is, and how nothing in it is ever half written.

OUTPUT/                 the converted model: a plain Hugging Face folder
    recipe.yaml         what was run, every default spelled out, and a fingerprint of the text
    metrics.json        what came of it; written last, so its presence means "complete"
    control/            the dense control, a run folder of its own (on request)
    logs/               what TensorBoard shows (on request)
    steps/              only while the run is not complete, or on request
        0-split/  1-attach/  2-train/    each complete or absent
        2-train.work/                    checkpoints inside a train step
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from moe_tools.checkpoint.atomic import new_file, new_folder, partial_of
from moe_tools.checkpoint.card import write_card
from moe_tools.names import LOGS, METRICS, RECIPE, STEPS_FOLDER
from moe_tools.recipe import Recipe, lasting, lasting_yaml, read_recipe

TEXT = "# text: "
"""Begins the first line of `recipe.yaml`; behind it stands the fingerprint."""


@dataclass(frozen=True)
class RunFolder:
    """The output of one recipe on one donor in one dtype."""

    output: Path
    recipe: Recipe
    source: str
    dtype: torch.dtype

    @property
    def identity(self) -> str:
        """What `recipe.yaml` holds: two runs of it on one text write the same weights."""
        return f"# donor: {self.source}\n# dtype: {self.dtype}\n{self.recipe.to_yaml()}"

    @property
    def steps(self) -> Path:
        """The folder of the steps."""
        return self.output / STEPS_FOLDER

    def step(self, index: int) -> Path:
        """The folder of one step."""
        return self.steps / f"{index}-{self.recipe.steps[index].verb}"

    def logs(self, index: int) -> Path:
        """Where TensorBoard finds a train step: it outlives the step's folder."""
        return self.output / LOGS / self.step(index).name

    def claim(self, check: Callable[[], None], fingerprint: Callable[[], str]) -> bool:
        """Takes the folder for this run; False when the run is complete already.

        `check` runs before the first file of a new run is written, and may raise. `fingerprint`
        names the text as it is now.

        Raises:
            ValueError: the folder holds something else, or was begun on another text.
        """
        marker = self.output / RECIPE
        if marker.is_file():
            began, identity = self.read_marker()
            if identity != self.identity:
                raise ValueError(
                    f"{self.output} holds another run (see {marker}): choose another --output, or "
                    "repeat that run's options to resume it"
                )
            now = fingerprint()
            if began != now:
                raise ValueError(
                    f"{self.output} was begun on the text {began or '(unknown)'}, and the same "
                    f"source is {now} now: one run has one text, choose another --output"
                )
            return not (self.output / METRICS).is_file()
        if self.output.exists() and not _is_free(self.output):
            raise ValueError(f"{self.output} exists and is not empty: choose another --output")
        check()
        with new_file(marker) as partial:
            partial.write_text(f"{TEXT}{fingerprint()}\n{self.identity}")
        return True

    def read_marker(self) -> tuple[str, str]:
        """The fingerprint of the text that the run began on, and its identity."""
        whole = (self.output / RECIPE).read_text()
        first, _, rest = whole.partition("\n")
        begun = (first.removeprefix(TEXT), rest) if first.startswith(TEXT) else ("", whole)
        return begun[0], lasting_yaml(begun[1])

    def adopt(self, output: Path) -> None:
        """Links the steps that another run did already: same donor and text, same steps so far."""
        other = RunFolder(output, lasting(read_recipe(output / RECIPE)), self.source, self.dtype)
        if other.read_marker()[1] != other.identity or not _same_text(self, other):
            return
        pairs = zip(self.recipe.steps, other.recipe.steps, strict=False)
        for index, (mine, theirs) in enumerate(pairs):
            if mine != theirs or not other.step(index).is_dir():
                return
            if not self.step(index).is_dir():
                with new_folder(self.step(index)) as partial:
                    for file in other.step(index).iterdir():
                        link(file, partial / file.name)

    def finish(self, keep_steps: bool) -> None:
        """Makes the last step's folder the output, metrics last, and drops the steps."""
        folders = [self.step(index) for index in range(len(self.recipe.steps))]
        for file in sorted(folders[-1].iterdir()):
            if file.name != METRICS:
                link(file, self.output / file.name)
        steps = [json.loads((folder / METRICS).read_text()) for folder in folders]
        metrics = {
            "recipe": self.recipe.name,
            "donor": self.source,
            "train_tokens": sum(step.get("trained_tokens", 0) for step in steps),
            "text": self.read_marker()[0],
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "steps": steps,
        }
        with new_file(self.output / METRICS) as partial:
            partial.write_text(json.dumps(metrics, indent=1))
        write_card(self.output)
        if not keep_steps:
            shutil.rmtree(self.steps)


def _same_text(one: RunFolder, other: RunFolder) -> bool:
    """Whether two runs calibrate and train on the same blocks, step by step."""

    def text(folder: RunFolder) -> tuple[object, ...]:
        recipe = folder.recipe
        trained = [step.tokens for step in recipe.steps if step.trains]
        return recipe.data, recipe.block_length, recipe.seed, trained

    return text(one) == text(other)


def _is_free(folder: Path) -> bool:
    """Nothing is in it, but perhaps what a run left that was killed before its first step."""
    return folder.is_dir() and set(folder.iterdir()) <= {partial_of(folder / RECIPE)}


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
