"""Runs a recipe's steps in order and resumes where a killed run stopped.

OUTPUT/                 the converted model: a plain Hugging Face folder
    recipe.yaml         what was run, every default spelled out
    metrics.json        what came of it; written last, so its presence means "complete"
    control/            the dense control, a run folder of its own (on request)
    steps/              only while the run is not complete, or on request
        0-split/  1-attach/  2-train/    each complete or absent
        2-train.work/                    checkpoints inside a train step
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from moe_tools.data import blocks, fingerprint, generate_blocks
from moe_tools.model.checkpoint import load, load_tokenizer, new_folder, save
from moe_tools.model.conversion import Conversion, read_conversion, write_conversion
from moe_tools.model.ffn import find_ffns
from moe_tools.model.partition import experts_of_size
from moe_tools.recipe import (
    Attach,
    Recipe,
    Split,
    Step,
    Train,
    control_recipe,
    read_recipe,
    recipe_path,
    step_name,
    with_options,
)
from moe_tools.steps.attach import attach
from moe_tools.steps.losses import DONOR_LOSSES
from moe_tools.steps.split import split
from moe_tools.steps.train import check_train, train

logger = logging.getLogger(__name__)

RECIPE, METRICS, STEPS, SAMPLES = "recipe.yaml", "metrics.json", "steps", "samples.safetensors"


def run(
    recipe: Recipe,
    model: str,
    output: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    control: bool = False,
    keep_steps: bool = False,
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

    Returns:
        `output`.

    Raises:
        ValueError: a user's mistake; nothing that was there before is changed.
        FloatingPointError: a train step's loss is not finite.
    """
    context = _Run(recipe, _lasting(str(model)), Path(output), dtype, device)
    if not context.claim():
        logger.info("%s is complete", output)
    else:
        context.execute()
        context.finish(keep_steps)
    if control:
        run(
            control_recipe(recipe),
            model,
            Path(output) / "control",
            dtype=dtype,
            device=device,
            keep_steps=keep_steps,
        )
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


@dataclass
class _Run:
    recipe: Recipe
    source: str
    output: Path
    dtype: torch.dtype
    device: str

    @property
    def steps_folder(self) -> Path:
        return self.output / STEPS

    def claim(self) -> bool:
        """Takes the output folder for this run; False when the run is complete already."""
        identity = f"# donor: {self.source}\n# dtype: {self.dtype}\n{self.recipe.to_yaml()}"
        marker = self.output / RECIPE
        if marker.is_file():
            if marker.read_text() != identity:
                raise ValueError(
                    f"{self.output} holds another run (see {marker}): choose another --output, or "
                    "repeat that run's options to resume it"
                )
            return not (self.output / METRICS).is_file()
        if self.output.exists() and not _is_free(self.output):
            raise ValueError(f"{self.output} exists and is not empty: choose another --output")
        self._check_before_writing()
        self.output.mkdir(parents=True, exist_ok=True)
        _write_atomically(marker, identity)
        return True

    def _check_before_writing(self) -> None:
        """Everything that can be wrong with the user's words, before the first folder exists."""
        _ = self.tokenizer
        self._rehearse()
        _ = self.train_blocks if self.recipe.data != "self" else None

    def _rehearse(self) -> None:
        """Every step's own checks, in order, on the donor: no text is read, nothing is trained."""
        model = self.donor()
        for step in self.recipe.steps:
            if isinstance(step, Split):
                for ffn in find_ffns(model):
                    experts_of_size(len(ffn.weights().up_FD), step.expert_size, ffn.name)
                write_conversion(model, Conversion(self.source, step.expert_size))
            elif isinstance(step, Attach):
                without_text = replace(step, start="open", when_off="zero")
                attach(model, without_text, self.source, _expert_size(model), torch.empty(0, 1))
            else:
                check_train(model, step, donor=model)

    def execute(self) -> None:
        """Every step that is not complete yet."""
        previous = self.source
        for index, step in enumerate(self.recipe.steps):
            folder = self.steps_folder / f"{index}-{step_name(step)}"
            if not folder.is_dir():
                self._execute_one(index, step, previous, folder)
            previous = str(folder)

    def _execute_one(self, index: int, step: Step, previous: str, folder: Path) -> None:
        logger.info("step %d: %s", index, step_name(step))
        set_seed(self.recipe.seed)
        began = time.time()
        model = load(previous, dtype=self.dtype, device=self.device)
        work = folder.with_name(f"{folder.name}.work")
        measured = self._apply(step, model, index, work)
        measured = {**asdict(step), **measured, "seconds": round(time.time() - began, 1)}
        with new_folder(folder) as partial:
            save(model, partial, self.tokenizer)
            (partial / METRICS).write_text(json.dumps(measured, indent=1))
        shutil.rmtree(work, ignore_errors=True)

    def _apply(self, step: Step, model: PreTrainedModel, index: int, work: Path) -> dict[str, Any]:
        if isinstance(step, Split):
            split(model, step, self._calibration(step.tokens), self.recipe.seed)
            write_conversion(model, Conversion(self.source, step.expert_size))
            return {}
        if isinstance(step, Attach):
            text = self._calibration(step.tokens)
            attach(model, step, self.source, _expert_size(model), text)
            return {}
        text = self._train_blocks_of(index)
        donor = self.donor() if set(step.losses) & set(DONOR_LOSSES) else None
        measured = train(model, step, text, work, donor=donor, seed=self.recipe.seed)
        seen = measured["steps"] * step.batch_size * step.accumulate * text.shape[1]
        return {**measured, "trained_tokens": min(seen, text.numel()), "data": fingerprint(text)}

    def finish(self, keep_steps: bool) -> None:
        """Makes the last step's folder the output, metrics last, and drops the steps."""
        folders = [
            self.steps_folder / f"{index}-{step_name(step)}"
            for index, step in enumerate(self.recipe.steps)
        ]
        for file in sorted(folders[-1].iterdir()):
            if file.name != METRICS:
                _link(file, self.output / file.name)
        steps = [json.loads((folder / METRICS).read_text()) for folder in folders]
        metrics = {
            "recipe": self.recipe.name,
            "donor": self.source,
            "train_tokens": sum(step.get("trained_tokens", 0) for step in steps),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "steps": steps,
        }
        _write_atomically(self.output / METRICS, json.dumps(metrics, indent=1))
        if not keep_steps:
            shutil.rmtree(self.steps_folder)

    def donor(self) -> PreTrainedModel:
        """The dense teacher."""
        return load(self.source, dtype=self.dtype, device=self.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The donor's."""
        return load_tokenizer(self.source)

    @cached_property
    def train_blocks(self) -> Tensor:
        """blocks_BT of all train steps together; at least what calibration asks for."""
        wanted = max(self.recipe.train_tokens(), *self._calibration_tokens(), 1)
        if self.recipe.data != "self":
            return blocks(
                self.recipe.data,
                self.tokenizer,
                split="train",
                length=self.recipe.block_length,
                tokens=wanted,
                seed=self.recipe.seed,
            )
        return _kept(self.steps_folder / SAMPLES, lambda: self._samples(wanted))

    def _samples(self, tokens: int) -> Tensor:
        length = self.recipe.block_length
        return generate_blocks(self.donor(), length=length, tokens=tokens, seed=self.recipe.seed)

    def _calibration_tokens(self) -> list[int]:
        return [s.tokens for s in self.recipe.steps if isinstance(s, Split | Attach)]

    def _calibration(self, tokens: int) -> Tensor:
        return self.train_blocks[: max(1, tokens // self.recipe.block_length)]

    def _train_blocks_of(self, index: int) -> Tensor:
        """The blocks of one train step: it goes on where the one before stopped.

        Together the steps see what one step of all their tokens would (the control does); if there
        is less text, each keeps its share.
        """
        tokens = [s.tokens if isinstance(s, Train) else 0 for s in self.recipe.steps]
        wanted = max(1, sum(tokens) // self.recipe.block_length)
        have = min(wanted, len(self.train_blocks))
        start = min(have - 1, have * sum(tokens[:index]) // sum(tokens))
        stop = have * sum(tokens[: index + 1]) // sum(tokens)
        return self.train_blocks[start : max(start + 1, stop)]


def _expert_size(model: PreTrainedModel) -> int:
    conversion = read_conversion(model)
    if conversion is None:
        raise ValueError("attach needs experts: put `split` before it in the recipe")
    return conversion.expert_size


def _is_free(folder: Path) -> bool:
    """Nothing is in it, but perhaps what a run left that was killed before its first step."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {_partial(RECIPE)}


def _lasting(source: str) -> str:
    """A local donor by its absolute path, so that it is found from any directory."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """The blocks in a file, made once."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file({"blocks_BT": make()}, partial)
        partial.rename(file)
    return load_file(file)["blocks_BT"]


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(_partial(path.name))
    partial.write_text(text)
    partial.rename(path)


def _partial(name: str) -> str:
    return f".{name}.partial"
