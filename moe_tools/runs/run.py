"""Runs a recipe's steps in order and resumes where a killed run stopped (see `run_folder`)."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from moe_tools import processes
from moe_tools.atomic import new_folder
from moe_tools.checkpoint.block_length import check_given
from moe_tools.checkpoint.companions import companions, put_beside
from moe_tools.checkpoint.digest import digest
from moe_tools.checkpoint.loading import load, load_tokenizer
from moe_tools.checkpoint.saving import save
from moe_tools.data import TaskText, Text
from moe_tools.data.tasks import HEADS
from moe_tools.names import CONTROL, METRICS
from moe_tools.recipe import Recipe, control_recipe, read_recipe, recipe_path, with_options
from moe_tools.runs.folder import Pins, RunFolder
from moe_tools.runs.held_out import check_held_out, held_out_text
from moe_tools.runs.prepare import prepare
from moe_tools.runs.stream import Streamed, check_streams, is_large, why_not
from moe_tools.runs.tasks import check_task, load_donor
from moe_tools.runs.text import RunText
from moe_tools.steps.launch import Launch
from moe_tools.steps.step import Step, Work
from moe_tools.training.attention import attention
from moe_tools.training.born_sharded import why_whole
from moe_tools.training.compiled import check_compiles
from moe_tools.training.teacher import check_teacher

logger = logging.getLogger(__name__)

Write = Callable[[Path, PreTrainedTokenizerBase], None]
"""Puts the model of a step into a folder."""


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
    stream: bool | None = None,
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
        stream: whether the steps run layer by layer, with one layer in memory, which changes
            nothing in the result (`moe_tools.runs.stream`). None: if the model is large for the
            free memory; the steps that cannot then run as ever.

    Returns:
        `output`.

    Raises:
        ValueError: a user's mistake, or another run in `output`, or a disk that refuses; nothing
            that was there before is changed.
        FloatingPointError: a train step's loss is not finite.
        TimeIsUp: the time of the launch is up; what is done is kept.
    """
    recipe = prepare(recipe, str(model))
    dense = control_recipe(recipe) if control else None  # one that there is not is said first
    source, launch = _lasting(str(model)), launch or Launch(device)
    work = _Run(RunFolder(Path(output), recipe, source, dtype), launch, stream)
    beside = None
    if dense is not None:
        beside = _Run(RunFolder(Path(output) / CONTROL, dense, source, dtype), launch, stream)
    work.complete(keep_steps, like=like, beside=beside)
    return Path(output)


def convert(
    model: str,
    output: str | Path,
    *,
    method: str = "lte",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    control: bool = False,
    stream: bool | None = None,
    **options: Any,
) -> Path:
    """Runs the recipe of a method, as `moe-tools convert --method` does.

    Args:
        model: as in `run`, like output, dtype, device, control and stream.
        output: see `run`.
        method: a recipe that comes with moe-tools; `moe-tools recipes` lists them.
        dtype: see `run`.
        device: see `run`.
        control: see `run`.
        stream: see `run`.
        **options: those of `moe_tools.recipe.with_options`, e.g. target_sparsity=0.5.

    Returns:
        `output`.

    Raises:
        ValueError: no such method, or a user's mistake as in `run`.
    """
    recipe = with_options(read_recipe(recipe_path(method)), **options)
    if options.get("block_length") is not None:
        check_given(model, recipe.block_length)
    return run(recipe, model, output, dtype=dtype, device=device, control=control, stream=stream)


class _Run:
    def __init__(self, folder: RunFolder, launch: Launch, stream: bool | None) -> None:
        self.folder, self.launch = folder, launch
        self.recipe, self.source, self.dtype = folder.recipe, folder.source, folder.dtype
        self.device = launch.device
        self.stream = stream

    def complete(
        self, keep_steps: bool, *, like: Path | None = None, beside: _Run | None = None
    ) -> None:
        """Does what is missing of it, and of the run `beside`, which may begin with its steps."""
        with self.folder.hold():
            unfinished = processes.on_first(lambda: self.begin(like))
            if unfinished:
                self.execute()
            else:
                logger.info("%s is complete", self.folder.output)
            if beside is not None:  # before the steps go
                beside.complete(keep_steps, like=self.folder.output)
            if unfinished:
                processes.on_first(lambda: self.folder.finish(keep_steps))

    def begin(self, like: Path | None) -> bool:
        """Takes the folder, with the steps that the run `like` did; False: it is complete."""
        other = None if like is None else self.folder.like(like, self._pins_of)
        unfinished = self.folder.claim(self.check, lambda: self.pins)
        if unfinished and other is not None:
            self.folder.adopt(other)
        return unfinished

    @cached_property
    def pins(self) -> Pins:
        """The text, which is read once, and the donor as it was at the start."""
        return Pins(self.text.fingerprint, digest(self.source))

    def _pins_of(self, recipe: Recipe) -> Pins:
        """What another recipe on this donor would begin on now."""
        text = RunText(recipe, self.tokenizer, self.folder.steps, self.donor)
        same = text.asks == self.text.asks  # mostly: then nothing is read twice
        return replace(self.pins, text=self.text.fingerprint if same else text.fingerprint)

    def check(self) -> None:
        """Everything that can be wrong with the user's words, before the first folder exists."""
        _ = self.tokenizer
        _ = self.streamed
        model = self._rehearse()
        self.text.check(model)
        check_held_out(self.recipe, self.tokenizer, model)
        for step in self.recipe.train_steps:
            check_teacher(step, self.launch, self.source)
        check_compiles(model, self.launch)
        with attention(model, self.launch.attention):
            pass  # whether it can

    def _check_donor(self) -> None:
        """A donor is read at several steps: as weights, as a teacher, layer by layer."""
        now = replace(self.pins, donor=digest(self.source))
        self.pins.check(now, self.folder.output, self.source)

    def _rehearse(self) -> PreTrainedModel:
        """Every step's own checks; without the donor's weights, where it can be built without.

        Returns the donor as they leave it.
        """
        empty = self.recipe.task not in HEADS and Path(self.source).suffix != ".gguf"
        model = load(self.source, dtype=self.dtype, device="meta") if empty else self.donor()
        check_task(self.recipe, model)
        with torch.device("meta") if empty else nullcontext():
            self.recipe.rehearse(model, self.source)
        return model

    @cached_property
    def streamed(self) -> list[bool]:
        """Whether each step runs layer by layer.

        Raises:
            ValueError: all are to, and one cannot.
        """
        steps = self.recipe.steps
        if self.stream:
            check_streams(self.recipe, self.source)
            return [True] * len(steps)
        if self.stream is False or not is_large(self.source, self.dtype):
            return [False] * len(steps)
        reasons = [why_not(step, self.recipe, self.source) for step in steps]
        for index, (step, reason) in enumerate(zip(steps, reasons, strict=True)):
            if reason is not None:
                logger.warning(
                    "the model is large for the free memory, but step %d, %s, needs it whole: %s",
                    index,
                    step.verb,
                    reason,
                )
        return [reason is None for reason in reasons]

    def execute(self) -> None:
        """Every step that is not complete yet; of several processes, only train steps use all."""
        previous, worked = self.source, False
        for index, step in enumerate(self.recipe.steps):
            folder = self.folder.step(index)
            if not processes.on_first(folder.is_dir):
                limit = self.launch.limit
                if worked and limit is not None and limit.is_up():  # every start does something
                    raise limit.stopped(f"before step {index}, {step.verb}")
                worked = True
                logger.info("step %d: %s", index, step.verb)
                processes.on_first(self._check_donor)
                if step.trains:
                    self._execute_one(index, step, previous, folder)
                else:
                    processes.on_first(partial(self._execute_one, index, step, previous, folder))
            previous = str(folder)

    def _execute_one(self, index: int, step: Step, previous: str, folder: Path) -> None:
        set_seed(self.recipe.seed)
        began = time.time()
        work = folder.with_name(f"{folder.name}.work")
        if self.streamed[index]:
            streamed = self._streamed(step, previous, work / "layers")
            measured, write = streamed.run(), streamed.save
        else:
            weights = self._in_shards(index, previous) if step.trains else None
            device = self.launch.home if step.trains else self.device
            device = device if weights is None else "meta"
            model = load(previous, dtype=self.dtype, device=device) if index else self.donor(device)
            lent = replace(self._lend(index, work), weights=weights)
            measured, write = step.apply(model, lent), partial(save, model)
        measured = {**step.options(), **measured, "seconds": round(time.time() - began, 1)}
        if step.trains:
            processes.on_first(partial(self._write, folder, write, measured, work))
        else:
            self._write(folder, write, measured, work)

    def _in_shards(self, index: int, previous: str) -> str | None:
        """The source of a train step's model, if no process has to load all of it; else None."""
        if self.launch.zero_stage != 3:
            return None
        if not index and self.recipe.task in HEADS:
            reason: str | None = "it may get a new head, which is made with the model"
        else:
            reason = why_whole(previous, self.launch)
        if reason is not None:
            logger.warning("every process loads the whole model: %s", reason)
        return previous if reason is None else None

    def _write(self, folder: Path, write: Write, measured: dict[str, Any], work: Path) -> None:
        with new_folder(folder) as unfinished:
            write(unfinished, self.tokenizer)
            put_beside(self.companions, unfinished)
            (unfinished / METRICS).write_text(json.dumps(measured, indent=1))
        shutil.rmtree(work, ignore_errors=True)

    def _lend(self, index: int, folder: Path) -> Work:
        """What a step gets from the run."""

        def training() -> Text:
            processes.on_first(self.text.prepare)
            return self.text.of_step(index)

        return Work(
            folder,
            self.source,
            self.recipe.seed,
            self.text.calibration,
            training,
            partial(self._teacher, index),
            replace(self.launch, logs=self.folder.logs(index)),
            partial(held_out_text, self.recipe, self.tokenizer),
            partial(self._teacher_source, index),
        )

    def _streamed(self, step: Step, previous: str, work: Path) -> Streamed:
        text = self.text.calibration(step.tokens) if step.needs_text() else None
        assert not isinstance(text, TaskText)  # see `why_not`
        return Streamed(
            previous,
            work,
            step,
            text,
            donor=self.source,
            seed=self.recipe.seed,
            dtype=self.dtype,
            device=self.device,
        )

    @cached_property
    def text(self) -> RunText:
        """What it calibrates and trains on."""
        return RunText(self.recipe, self.tokenizer, self.folder.steps, self.donor)

    def _teacher(self, index: int, device: str) -> PreTrainedModel:
        """The teacher of a train step, on a device."""
        source = self._teacher_source(index)
        if source == self.source:
            return self.donor(device)
        return load(source, dtype=self.dtype, device=device)

    def _teacher_source(self, index: int) -> str:
        """The model of a train step as it was before the first step that changed its function.

        Dense training before `swap` or `attach` makes a better teacher than the donor: it knows
        the text.
        """
        before = self.recipe.steps[:index]
        changed = next((i for i, step in enumerate(before) if step.changes_function), 0)
        return str(self.folder.step(changed - 1)) if changed else self.source

    def donor(self, device: str | None = None) -> PreTrainedModel:
        """The dense model that all starts from."""
        device = device or self.device
        return load_donor(self.recipe, self.source, dtype=self.dtype, device=device)

    @cached_property
    def companions(self) -> dict[Path, Path]:
        """What stands beside the donor's weights: for a hub id, the hub is asked once."""
        return companions(self.source)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the donor."""
        return load_tokenizer(self.source)


def _lasting(source: str) -> str:
    """A local donor by its absolute path, so that it is found from any directory."""
    return str(Path(source).resolve()) if Path(source).exists() else source
