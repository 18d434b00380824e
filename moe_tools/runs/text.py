"""The text of a run: what calibrates, and what each train step sees.

Letters: B blocks, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.checkpoint.atomic import new_file
from moe_tools.data import (
    Batch,
    Text,
    blocks,
    fingerprint,
    generate_blocks,
    labelled_batches,
    labelled_blocks,
)
from moe_tools.data.generate import check_samples
from moe_tools.data.limits import check_text
from moe_tools.recipe import Recipe, Train

SAMPLES = "samples.safetensors"


class RunText:
    """Blocks and batches of one recipe, made when they are first asked for."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        kept: Path,
        donor: Callable[[], PreTrainedModel],
    ) -> None:
        """`kept` is the folder for the samples of `data: self`, which `donor` makes."""
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.kept = kept
        self.donor = donor

    def check(self, donor: PreTrainedModel) -> None:
        """Reads what can be read before the run, and whether the donor, maybe empty, can take it.

        Raises:
            ValueError: the text is not there, too short, or not for this model.
        """
        length, task = self.recipe.block_length, self.recipe.task
        if self.recipe.data == "self":
            check_samples(donor, length)
        else:
            check_text(donor, self.labelled if task == "classify" else self.train_blocks)
        if task == "lm" and length < 2 and self.recipe.train_steps:
            raise ValueError("block_length is 1, and nothing follows the token: use 2 or more")

    def prepare(self) -> None:
        """Makes what is kept in a file, so that several processes then read the same."""
        if self.recipe.data == "self":
            _ = self.train_blocks

    @property
    def fingerprint(self) -> str:
        """Shows that a resumed run goes on with the text it began with.

        `self` for the donor's own samples: they are kept in the run's folder, and made there late.
        """
        if self.recipe.data == "self":
            return "self"
        return fingerprint(self.labelled if self.recipe.task == "classify" else self.train_blocks)

    @cached_property
    def train_blocks(self) -> Tensor:
        """blocks_BT of all train steps together; at least what calibration asks for.

        To classify, they are the labelled rows end to end: those that training sees.
        """
        wanted = self._wanted()
        if self.recipe.task == "classify":
            return labelled_blocks(self.labelled, self.recipe.block_length)
        if self.recipe.data != "self":
            return blocks(
                self.recipe.data,
                self.tokenizer,
                split="train",
                length=self.recipe.block_length,
                tokens=wanted,
                seed=self.recipe.seed,
            )
        return _kept(self.kept / SAMPLES, lambda: self._samples(wanted))

    def _samples(self, tokens: int) -> Tensor:
        length = self.recipe.block_length
        return generate_blocks(self.donor(), length=length, tokens=tokens, seed=self.recipe.seed)

    @property
    def asks(self) -> tuple[object, ...]:
        """All that it depends on but what is in its source: two that ask alike see the same."""
        recipe, trains = self.recipe, self.recipe.train_steps
        rows = trains[0].batch_size if trains and recipe.task == "classify" else None
        return recipe.task, recipe.data, recipe.block_length, recipe.seed, self._wanted(), rows

    def _wanted(self) -> int:
        """Tokens that the hungriest reader asks for: all train steps, or one that calibrates."""
        calibrate = [step.tokens for step in self.recipe.steps if not step.trains]
        return max(self.recipe.train_tokens(), *calibrate, 1)

    def calibration(self, tokens: int) -> Tensor:
        """The first blocks."""
        return self.train_blocks[: max(1, tokens // self.recipe.block_length)]

    def of_step(self, index: int) -> Text:
        """The text of one train step: it goes on where the one before stopped.

        Together the steps see what one step of all their tokens would (the control does); if there
        is less text, each keeps its share.
        """
        tokens = [step.tokens if step.trains else 0 for step in self.recipe.steps]
        before, after, whole = sum(tokens[:index]), sum(tokens[: index + 1]), sum(tokens)
        if self.recipe.task == "classify":
            return _between(self.labelled, before, after)
        wanted = max(1, whole // self.recipe.block_length)
        have = min(wanted, len(self.train_blocks))
        start = min(have - 1, have * before // whole)
        return self.train_blocks[start : max(start + 1, have * after // whole)]

    @cached_property
    def labelled(self) -> list[Batch]:
        """What calibrates a classifier, and what all of its train steps see together."""
        trains = self.recipe.train_steps
        return labelled_batches(
            self.recipe.data,
            self.tokenizer,
            split="train",
            length=self.recipe.block_length,
            batch_size=trains[0].batch_size if trains else Train.batch_size,
            tokens=self._wanted(),
            seed=self.recipe.seed,
        )


def _between(batches: list[Batch], before: int, after: int) -> list[Batch]:
    """The batches that begin between two numbers of tokens."""
    seen, chosen = 0, []
    for batch in batches:
        if before <= seen < after:
            chosen.append(batch)
        seen += batch.ids_BT.numel()
    return chosen


def _kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """The blocks in a file, made once."""
    if not file.is_file():
        with new_file(file) as partial:
            save_file({"blocks_BT": make()}, partial)
    return load_file(file)["blocks_BT"]
