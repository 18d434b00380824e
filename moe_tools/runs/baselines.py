"""Baselines of a table: dense quantised models, and methods that need calibration text alone.

Most are recipes, done to a dense model in memory by the same steps as a conversion. All are
measured on the same text as the models beside them.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from transformers import PreTrainedModel

from moe_tools.data import Blocks, TaskText
from moe_tools.data.packing import blocks_for
from moe_tools.experts.conversion import read_block, write_conversion
from moe_tools.hosts.input_threshold import remove_thresholds, thresholds_in
from moe_tools.measure.evaluate import Evaluation
from moe_tools.recipe import Recipe, parse_recipe, read_recipe, recipe_path
from moe_tools.report.by_prompt import measured_by_prompt
from moe_tools.report.compare import Bench
from moe_tools.report.entries import find_control
from moe_tools.steps.step import Step, Work

Correct = Callable[[Evaluation], Evaluation]
"""Takes what was saved from the figures of an evaluation that could not see it."""


@dataclass(frozen=True)
class Given:
    """What a table gives to its baselines."""

    donor: str
    """The dense model: folder, hub id or GGUF file."""
    calibration_BT: Blocks
    """Training text."""
    after: int = 0
    """Tokens of every block that are a prompt."""
    seed: int = 0


class Baseline(ABC):
    """One bar, at a budget where it takes one."""

    title: str
    """The line of a plot."""
    takes_budget: bool = True

    def reusable(self) -> bool:
        """Whether a prepared model can be measured at one budget after another."""
        return True

    def prepare(self, model: PreTrainedModel, given: Given) -> None:
        """Does once what no budget changes, to a dense model that was just loaded; or nothing.

        Raises:
            ValueError: a model that it cannot be done to.
        """
        del model, given

    @abstractmethod
    def at(
        self, model: PreTrainedModel, off: float, given: Given
    ) -> AbstractContextManager[Correct]:
        """While it lasts, a prepared model is what this says; other budgets may follow.

        Args:
            model: prepared.
            off: share of the neurons (of TEAL, the inputs) that are off; ignored without a budget.
            given: what the table gives.

        Raises:
            ValueError: a budget out of range, or a model that it cannot be done to.
        """


@dataclass(frozen=True)
class ByRecipe(Baseline):
    """The steps of a recipe, but for those that train."""

    title: str
    recipe: Callable[[], Recipe]
    takes_budget: bool = True

    def reusable(self) -> bool:
        """Not where steps follow the one that the budget changes, which nothing undoes."""
        return len(self._steps()[1]) <= 1

    def prepare(self, model: PreTrainedModel, given: Given) -> None:
        """Does all steps before the one that the budget changes."""
        for step in self._steps()[0]:
            apply(step, model, given)

    @contextmanager
    def at(self, model: PreTrainedModel, off: float, given: Given) -> Iterator[Correct]:
        """Does the step that the budget changes, and all that follow it."""
        for step in self._steps()[1]:
            if step.takes("target_sparsity"):
                step = step.changed("target_sparsity", off)
                step.check()
            apply(step, model, given)
        yield lambda seen: seen

    def _steps(self) -> tuple[list[Step], list[Step]]:
        """Those before the first that a budget changes, and the others."""
        steps = [step for step in self.recipe().steps if not step.trains]
        takes = (at for at, step in enumerate(steps) if step.takes("target_sparsity"))
        first = next(takes, len(steps))
        return steps[:first], steps[first:]


class Teal(ByRecipe):
    """Thresholds, which another budget finds again from the start."""

    @contextmanager
    def at(self, model: PreTrainedModel, off: float, given: Given) -> Iterator[Correct]:
        """Drops inputs while it lasts."""
        before = read_block(model.config)
        try:
            with super().at(model, off, given) as correct:
                yield correct
        finally:
            remove_thresholds(model, thresholds_in(model).values())
            write_conversion(model, before)


class Griffin(Baseline):
    """The neurons that mattered for the beginning of a block; its figures are those of the rest."""

    title = "GRIFFIN"

    def at(
        self, model: PreTrainedModel, off: float, given: Given
    ) -> AbstractContextManager[Correct]:
        """Selects while the text runs."""
        return measured_by_prompt(model, 1 - off, given.after)


def method(name: str) -> Callable[[], Recipe]:
    """Reads the recipe of a method when it is asked for."""
    return lambda: read_recipe(recipe_path(name))


def quantized(bits: int) -> Callable[[], Recipe]:
    """A recipe that rounds the FFNs' weights."""
    steps = [{"quantize": {"bits": bits}}]
    return lambda: parse_recipe({"name": f"int{bits}", "steps": steps})


BASELINES: dict[str, Baseline] = {
    "int8": ByRecipe("dense int8", quantized(8), takes_budget=False),
    "int4": ByRecipe("dense int4", quantized(4), takes_budget=False),
    "teal": Teal("TEAL", method("teal")),
    "cats": ByRecipe("CATS", method("cats")),
    "few_bits": ByRecipe("few bits", method("prox")),
    "griffin": Griffin(),
}


def default_after(after: int | None, names: Sequence[str], block_length: int) -> int:
    """Tokens of every block that are not predicted: as asked, else half of it for griffin."""
    if after is not None:
        return after
    return block_length // 2 if "griffin" in names else 0


def apply(step: Step, model: PreTrainedModel, given: Given) -> None:
    """Does a step that trains nothing to a model, in place.

    Raises:
        ValueError: as the step.
    """

    def calibration(tokens: int) -> Blocks:
        if isinstance(given.calibration_BT, TaskText):
            return given.calibration_BT
        count = blocks_for(tokens, given.calibration_BT.shape[1])
        return given.calibration_BT[:count].to(model.device)

    def refuse() -> NoReturn:
        raise AssertionError("a baseline trains nothing")

    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), given.donor, given.seed, calibration, refuse, refuse)
        step.apply(model, work)


def measure_baselines(
    bench: Bench,
    names: Sequence[str],
    budgets: Sequence[float],
    donor: str,
    control: str | None = None,
) -> None:
    """Adds a row for every baseline, and budget where it takes one, to a bench.

    Args:
        bench: has the text.
        names: of `BASELINES`.
        budgets: shares that are off.
        donor: what they are done to.
        control: the donor after training without routers: then they are done to it.

    Raises:
        ValueError: as `Baseline.at`; or as `evaluate`.
    """
    for name in names:
        measure_baseline(bench, name, BASELINES[name], budgets, donor, control)


def measure_baseline(
    bench: Bench,
    name: str,
    bar: Baseline,
    budgets: Sequence[float],
    donor: str,
    control: str | None = None,
) -> None:
    """Adds the rows of one baseline; arguments are those of `measure_baselines`."""
    given = Given(donor, bench.calibration_BT, bench.setup.after, bench.setup.seed)
    model: PreTrainedModel | None = None
    for off in budgets if bar.takes_budget else (0.0,):
        if model is None or not bar.reusable():
            model = bench.load(control or donor)
            bar.prepare(model, given)
        title = f"{name} at {off:g}" if bar.takes_budget else bar.title
        with bar.at(model, off, given) as correct:
            bench.measure_changed(title, bar.title, model, correct, donor, control)


def measure_beside(
    bench: Bench,
    names: Sequence[str],
    budgets: Sequence[float],
    folder: str,
    donor: str | None = None,
) -> None:
    """Adds baselines to a bench that measured a folder: on its control, else on its donor.

    Args:
        bench: has measured the folder.
        names: as in `measure_baselines`.
        budgets: the same.
        folder: converted or dense.
        donor: stands in for the donor that the folder names.

    Raises:
        ValueError: as `measure_baselines`.
    """
    own = next((entry.donor for entry in bench.entries if entry.folder == folder), None)
    measure_baselines(bench, names, budgets, donor or own or folder, find_control(folder))
