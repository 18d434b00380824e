"""The text of a run: what calibrates, and what each train step sees.

Letters: B blocks, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.atomic import new_file
from moe_tools.data import (
    Batch,
    Batches,
    Blocks,
    Rows,
    Text,
    calibration_text,
    fingerprint,
    generate_blocks,
    rows,
    task_batches,
    token_count,
)
from moe_tools.data.generate import check_samples
from moe_tools.data.limits import check_text
from moe_tools.data.rows import Epochs, of_blocks
from moe_tools.hosts.isolation import check_packing
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
            if self.recipe.epochs:
                raise ValueError(
                    "data is 'self', the donor's own samples, which have no end and no epochs: "
                    "give the train steps tokens"
                )
        else:
            check_text(donor, self.labelled if task != "lm" else self.rows)
        if task == "lm" and length < 2 and self.recipe.train_steps:
            raise ValueError("block_length is 1, and nothing follows the token: use 2 or more")
        if self.recipe.train_steps:
            check_packing(donor, self.recipe.packing)

    def prepare(self) -> None:
        """Makes what is kept in a file, so that several processes then read the same."""
        if self.recipe.data == "self":
            _ = self.rows

    @property
    def fingerprint(self) -> str:
        """Shows that a resumed run goes on with the text it began with.

        `self` for the donor's own samples: they are kept in the run's folder, and made there late.
        """
        if self.recipe.data == "self":
            return "self"
        if self.recipe.task != "lm":
            return fingerprint(self.labelled)
        return self.rows.fingerprint

    @cached_property
    def rows(self) -> Rows:
        """What all train steps see together, in order; at least what calibration asks for.

        Of epochs, the text once and once more in another order, and so on.
        """
        recipe, wanted = self.recipe, self._wanted()
        if recipe.data == "self":
            return of_blocks(_kept(self.kept / SAMPLES, lambda: self._samples(wanted)))
        found = rows(
            recipe.data,
            self.tokenizer,
            split="train",
            length=recipe.block_length,
            tokens=None if recipe.epochs else wanted,
            seed=recipe.seed,
            packing=recipe.packing,
            bos=recipe.bos,
        )
        return Epochs(found, recipe.epochs, recipe.seed) if recipe.epochs else found

    def _samples(self, tokens: int) -> Tensor:
        length = self.recipe.block_length
        return generate_blocks(self.donor(), length=length, tokens=tokens, seed=self.recipe.seed)

    @property
    def asks(self) -> tuple[object, ...]:
        """All that it depends on but what is in its source: two that ask alike see the same."""
        recipe, trains = self.recipe, self.recipe.train_steps
        rows = trains[0].batch_size if trains and recipe.task != "lm" else None
        read = recipe.task, recipe.data, recipe.block_length, recipe.packing, recipe.bos
        return (*read, recipe.seed, recipe.epochs, self._wanted(), rows)

    def _wanted(self) -> int:
        """Tokens that the hungriest reader asks for: all train steps, or one that calibrates."""
        calibrate = [step.tokens for step in self.recipe.steps if not step.trains]
        return max(self.recipe.train_tokens(), *calibrate, 1)

    def calibration(self, tokens: int) -> Blocks:
        """The first rows, as blocks_BT where a row is one text."""
        if self.recipe.task != "lm":
            return calibration_text(self.labelled, self.recipe.block_length, tokens)
        return self.rows.tensor(self.rows.covering(tokens))

    def of_step(self, index: int) -> Text:
        """The text of one train step: it goes on where the one before stopped.

        Together the steps see what one step of all their tokens would (the control does); if there
        is less text, each keeps its share.
        """
        amounts = [step.amount if step.trains else 0 for step in self.recipe.steps]
        before, after, whole = sum(amounts[:index]), sum(amounts[: index + 1]), sum(amounts)
        if self.recipe.task != "lm":
            tokens = self._tokens_of(amounts[:index]), self._tokens_of(amounts[: index + 1])
            return _between(self.labelled, *tokens)
        have = len(self.rows) if self.recipe.epochs else self.rows.covering(int(whole))
        start = min(have - 1, int(have * before // whole))
        part = self.rows.part(start, max(start + 1, int(have * after // whole)))
        step = self.recipe.steps[index]
        assert isinstance(step, Train)
        return self._batches(part, step.batch_size)

    def _batches(self, rows: Rows, batch_size: int) -> Batches:
        return Batches(rows, self.recipe.packing, batch_size)

    @cached_property
    def labelled(self) -> list[Batch]:
        """Of any task but lm: what calibrates, and what all train steps see together."""
        wanted = max(self._wanted(), self._tokens_of([self.recipe.train_amount()]))
        return self._labelled(wanted)

    def _tokens_of(self, amounts: Sequence[float]) -> int:
        """Tokens or epochs of labelled texts, in tokens."""
        return round(sum(amounts) * (self._epoch if self.recipe.epochs else 1))

    @cached_property
    def _epoch(self) -> int:
        """Tokens of all labelled texts."""
        return token_count(self._labelled(None))

    def _labelled(self, tokens: int | None) -> list[Batch]:
        trains = self.recipe.train_steps
        return task_batches(
            self.recipe.task,
            self.recipe.data,
            self.tokenizer,
            split="train",
            length=self.recipe.block_length,
            batch_size=trains[0].batch_size if trains else Train.batch_size,
            tokens=tokens,
            seed=self.recipe.seed,
        )


def _between(batches: list[Batch], before: int, after: int) -> list[Batch]:
    """The batches that begin between two numbers of tokens."""
    seen, chosen = 0, []
    for batch in batches:
        if before <= seen < after:
            chosen.append(batch)
        seen += batch.tokens
    return chosen


def _kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """The blocks in a file, made once."""
    if not file.is_file():
        with new_file(file) as partial:
            save_file({"blocks_BT": make()}, partial)
    return load_file(file)["blocks_BT"]
