"""Runs a recipe's steps in order and resumes where a killed run stopped (see `run_folder`)."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from moe_tools import processes
from moe_tools.data import fingerprint, label_names
from moe_tools.model.atomic import new_folder
from moe_tools.model.checkpoint import load, load_classifier, load_tokenizer, save
from moe_tools.model.conversion import Conversion, conversion_so_far, write_conversion
from moe_tools.recipe import (
    Attach,
    Budget,
    Fit,
    Recipe,
    Split,
    Step,
    Swap,
    control_recipe,
    read_recipe,
    recipe_path,
    step_name,
    with_options,
)
from moe_tools.rehearsal import rehearse, with_split
from moe_tools.run_folder import METRICS, RunFolder
from moe_tools.run_text import RunText
from moe_tools.steps.attach import attach
from moe_tools.steps.budget import budget
from moe_tools.steps.fit import fit
from moe_tools.steps.launch import Launch
from moe_tools.steps.losses import DONOR_LOSSES
from moe_tools.steps.split import split
from moe_tools.steps.swap import swap
from moe_tools.steps.train import train

logger = logging.getLogger(__name__)


def run(
    recipe: Recipe,
    model: str,
    output: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    control: bool = False,
    keep_steps: bool = False,
    like: Path | None = None,
    launch: Launch | None = None,
) -> Path:
    """Converts `model` by `recipe` into the folder `output`; the same call resumes.

    Args:
        recipe: the steps.
        model: the donor: folder, hub id or GGUF file.
        output: a new or empty folder, or one that a killed run of the same recipe left.
        dtype: of the host's weights while training; bf16 weights get fp32 masters.
        device: where it runs.
        control: also train the dense control on the same tokens, into `output/control`.
        keep_steps: keep the folder of every step.
        like: a run that kept its steps; those at its start that are the same are not done again.
        launch: how train steps are computed; default: by PyTorch on `device`. In several processes
            (`processes.process_group`) every one makes this call on one shared `output`; all steps
            but train are the first one's alone, and only it writes.

    Returns:
        `output`.

    Raises:
        ValueError: a user's mistake; nothing that was there before is changed.
        FloatingPointError: a train step's loss is not finite.
    """
    folder = RunFolder(Path(output), recipe, _lasting(str(model)), dtype)
    work = _Run(folder, launch or Launch(device))
    unfinished = processes.on_first(lambda: folder.claim(work.check))
    if unfinished:
        if like is not None:
            processes.on_first(lambda: folder.adopt(like))
        work.execute()
    else:
        logger.info("%s is complete", output)
    if control:  # before the steps go: it begins with the dense ones among them
        run(
            control_recipe(recipe),
            model,
            Path(output) / "control",
            dtype=dtype,
            device=device,
            keep_steps=keep_steps,
            like=Path(output),
            launch=launch,
        )
    if unfinished:
        processes.on_first(lambda: folder.finish(keep_steps))
    return Path(output)


def convert(
    model: str,
    output: str | Path,
    *,
    method: str = "lte",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    control: bool = False,
    **options: Any,
) -> Path:
    """Runs the recipe of a method, as `moe-tools convert --method` does.

    Args:
        model: as in `run`, like output, dtype, device and control.
        output: see `run`.
        method: a recipe that comes with moe-tools; `moe-tools recipes` lists them.
        dtype: see `run`.
        device: see `run`.
        control: see `run`.
        **options: those of `moe_tools.recipe.with_options`, e.g. target_sparsity=0.5.

    Returns:
        `output`.

    Raises:
        ValueError: no such method, or a user's mistake as in `run`.
    """
    recipe = with_options(read_recipe(recipe_path(method)), **options)
    return run(recipe, model, output, dtype=dtype, device=device, control=control)


class _Run:
    def __init__(self, folder: RunFolder, launch: Launch) -> None:
        self.folder, self.launch = folder, launch
        self.recipe, self.source, self.dtype = folder.recipe, folder.source, folder.dtype
        self.device = launch.device

    def check(self) -> None:
        """Everything that can be wrong with the user's words, before the first folder exists."""
        _ = self.tokenizer
        rehearse(self.recipe, self.donor(), self.source)
        self.text.check()

    def _so_far(self, model: PreTrainedModel) -> Conversion:
        """What the steps before did to a model, and from which donor it came."""
        return conversion_so_far(model, self.source)

    def execute(self) -> None:
        """Every step that is not complete yet; of several processes, only train steps use all."""
        previous = self.source
        for index, step in enumerate(self.recipe.steps):
            folder = self.folder.step(index)
            if not processes.on_first(folder.is_dir):
                logger.info("step %d: %s", index, step_name(step))
                if isinstance(step, Train):
                    self._execute_one(index, step, previous, folder)
                else:
                    processes.on_first(partial(self._execute_one, index, step, previous, folder))
            previous = str(folder)

    def _execute_one(self, index: int, step: Step, previous: str, folder: Path) -> None:
        set_seed(self.recipe.seed)
        began = time.time()
        device = self.launch.home if isinstance(step, Train) else self.device
        model = load(previous, dtype=self.dtype, device=device) if index else self.donor(device)
        work = folder.with_name(f"{folder.name}.work")
        measured = self._apply(step, model, index, work)
        measured = {**asdict(step), **measured, "seconds": round(time.time() - began, 1)}
        if isinstance(step, Train):
            processes.on_first(partial(self._write, folder, model, measured, work))
        else:
            self._write(folder, model, measured, work)

    def _write(
        self, folder: Path, model: PreTrainedModel, measured: dict[str, Any], work: Path
    ) -> None:
        with new_folder(folder) as unfinished:
            save(model, unfinished, self.tokenizer)
            (unfinished / METRICS).write_text(json.dumps(measured, indent=1))
        shutil.rmtree(work, ignore_errors=True)

    def _apply(self, step: Step, model: PreTrainedModel, index: int, work: Path) -> dict[str, Any]:
        if isinstance(step, Swap):
            return swap(model, step, self._so_far(model), self.text.calibration(step.tokens))
        if isinstance(step, Split):
            split(model, step, self.text.calibration(step.tokens), self.recipe.seed)
            write_conversion(model, with_split(self._so_far(model), step))
            return {}
        if isinstance(step, Attach):
            attach(model, step, self._so_far(model), self.text.calibration(step.tokens))
            return {}
        if isinstance(step, Fit):
            text = self.text.calibration(step.tokens)
            return fit(model, step, text, work, seed=self.recipe.seed)
        if isinstance(step, Budget):
            return budget(model, step, self.text.calibration(step.tokens))
        processes.on_first(self.text.prepare)
        seen = self.text.of_step(index)
        teacher = self._teacher(index) if set(step.losses) & set(DONOR_LOSSES) else None
        measured = train(
            model,
            step,
            seen,
            work,
            donor=teacher,
            seed=self.recipe.seed,
            launch=replace(self.launch, logs=self.folder.logs(index)),
        )
        return {**measured, "data": fingerprint(seen)}

    @cached_property
    def text(self) -> RunText:
        """What it calibrates and trains on."""
        return RunText(self.recipe, self.tokenizer, self.folder.steps, self.donor)

    def _teacher(self, index: int) -> PreTrainedModel:
        """What the model of a train step was before a step changed what it computes.

        Dense training before `swap` or `attach` makes a better teacher than the donor: it knows
        the text.
        """
        before = self.recipe.steps[:index]
        changed = next((i for i, step in enumerate(before) if isinstance(step, Swap | Attach)), 0)
        if not changed:
            return self.donor()
        return load(self.folder.step(changed - 1), dtype=self.dtype, device=self.device)

    def donor(self, device: str | None = None) -> PreTrainedModel:
        """The dense model that all starts from."""
        device = device or self.device
        if self.recipe.task == "classify":
            labels = label_names(self.recipe.data)
            return load_classifier(self.source, labels, dtype=self.dtype, device=device)
        return load(self.source, dtype=self.dtype, device=device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The donor's."""
        return load_tokenizer(self.source)


def _lasting(source: str) -> str:
    """A local donor by its absolute path, so that it is found from any directory."""
    return str(Path(source).resolve()) if Path(source).exists() else source
