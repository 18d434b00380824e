"""Checkpoints inside a train step: complete or ignored, and never of a model that is spoilt.

Each says what has to be the same for a run to go on from it: its processes, and its text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from moe_tools import processes
from moe_tools.atomic import settle
from moe_tools.disk import CannotWrite, refusal
from moe_tools.names import SINGLE
from moe_tools.steps.launch import Launch
from moe_tools.training import zero
from moe_tools.training.weight_file import load_weights, save_weights

TRAINER_STATE = "trainer_state.json"
LAYOUT = "moe_tools_layout"
"""Where a checkpoint says which processes wrote it."""
TEXT = "moe_tools_text"
"""Where it has a fingerprint of the text of its step."""


def newest_checkpoint(work: Path) -> str | None:
    """Returns the last complete checkpoint: the Trainer writes `trainer_state.json` last."""
    complete = [(step, str(folder)) for folder, step in _checkpoints(work)]
    return max(complete)[1] if complete else None


def _checkpoints(work: Path) -> list[tuple[Path, int]]:
    """Returns the complete checkpoints, each with the optimizer steps that it has seen."""
    found = []
    for folder in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            found.append((folder, int(_state(folder)["global_step"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE).read_text())
    return state


def layout(launch: Launch, accumulate: int) -> dict[str, int | None]:
    """Returns what decides whether a run can go on with another's checkpoint."""
    return {
        "processes": processes.count(),
        "zero": launch.zero_stage,
        "accumulate": accumulate,
    }


def check_layout(checkpoint: str | None, launch: Launch, accumulate: int) -> bool:
    """Checks that this run can go on from a checkpoint.

    Any number of processes can, as long as an optimizer step sees the same blocks: accumulate x
    processes is what it was.

    Returns:
        Whether other processes wrote it, so that what is in shards has to be divided anew.

    Raises:
        ValueError: an optimizer step would see more blocks or fewer, or another stage of ZeRO.
    """
    if checkpoint is None:
        return False
    now = layout(launch, accumulate)
    written = now | _state(Path(checkpoint)).get("stateful_callbacks", {}).get(LAYOUT, {})
    if written["zero"] != now["zero"]:
        raise ValueError(
            f"{checkpoint} was written by {_in_words(written)}, but this run has "
            f"{_in_words(now)}: start it as it was started before, or choose another --output"
        )
    before, passes = _passes(written), _passes(now)
    if before != passes:
        raise ValueError(
            f"{checkpoint} was written by {_in_words(written)}, {before} passes an optimizer step "
            f"(accumulate x processes), but this run has {passes}: set `accumulate` so that they "
            "are the same, or start it as it was started before"
        )
    return written["processes"] != now["processes"]


def _passes(layout: dict[str, int | None]) -> int:
    assert layout["processes"] is not None and layout["accumulate"] is not None
    return layout["processes"] * layout["accumulate"]


def check_text(checkpoint: str | None, text: str) -> None:
    """Checks that this run goes on with the text that a checkpoint has begun on, by fingerprint.

    Raises:
        ValueError: it is another one, or not the same in every process.
    """
    if not processes.all_agree(processes.on_first(lambda: text) == text):
        raise ValueError(
            f"this process reads the text {text}, but the first one another: give every machine "
            "the same files"
        )
    if checkpoint is None:
        return
    begun = _state(Path(checkpoint)).get("stateful_callbacks", {}).get(TEXT, text)
    if begun != text:
        raise ValueError(
            f"{checkpoint} was begun on the text {begun}, but this run reads {text}: one train "
            "step has one text, bring that back or choose another --output"
        )


def _in_words(layout: dict[str, int | None]) -> str:
    zero_stage = layout["zero"]
    how = "without DeepSpeed" if zero_stage is None else f"under ZeRO-{zero_stage}"
    count = layout["processes"]
    return f"{count} process{'' if count == 1 else 'es'} {how}"


class CheckpointingTrainer(Trainer):
    """Writes checkpoints without pickled arguments, and none with a weight that is not finite."""

    model: nn.Module
    launch: Launch
    text: str = ""
    """Fingerprint of the text of the step."""
    state: Any  # `stateful_callbacks` is annotated as what it is made from

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._check_weights()
        self.state.stateful_callbacks |= {
            LAYOUT: layout(self.launch, self.args.gradient_accumulation_steps),
            TEXT: self.text,
        }
        work, step = Path(str(self.args.output_dir)), self.state.global_step
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own
            folder = work / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            if (folder, step) in _checkpoints(work):
                raise  # it is complete: something else went wrong
            shutil.rmtree(folder, ignore_errors=True)
            refused = refusal(error, work)
            reason, way_out = refused or (str(error).splitlines()[0], "make room")
            raise CannotWrite(
                f"the checkpoint of optimizer step {step} cannot be written to {work}: {reason}; "
                f"the last good one is kept: {way_out}, and the same command goes on from it"
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the weights, except under DeepSpeed, whose own checkpoint has them."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder / SINGLE)

    def _save_rng_state(self, output_dir: str) -> None:
        """Waits for all processes after their last file: only then a checkpoint may be complete.

        By then it is on the disk: after a power cut, too, a complete one has all its weights.
        """
        super()._save_rng_state(output_dir)
        processes.barrier()  # what others still write comes and goes under passing names
        if processes.rank() == 0:
            settle(Path(output_dir))
        processes.barrier()

    def _check_weights(self) -> None:
        """Checks the weights: a gradient that overflows spoils them before any loss shows it."""
        spoilt = zero.not_finite(self.model)
        if not processes.all_agree(spoilt is None):
            raise FloatingPointError(
                f"{spoilt or 'a weight'} is not finite after optimizer step "
                f"{self.state.global_step}: lower the learning rates; the last good checkpoint is "
                "kept"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint) / SINGLE)
