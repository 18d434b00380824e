"""Baselines of a table: dense quantised models, and methods that need calibration text alone.

Most are recipes of one line or three, done to a dense model that was just loaded by the same steps
as a conversion. All are measured on the same text as the models beside them.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.data.packing import blocks_for
from moe_tools.measure.evaluate import Evaluation
from moe_tools.measure.teal import inputs_dropped, read_shares, with_reads
from moe_tools.recipe import Recipe, parse_recipe, with_options
from moe_tools.report.by_prompt import measured_by_prompt
from moe_tools.report.compare import Bench
from moe_tools.report.entries import find_control
from moe_tools.steps.step import Work

Correct = Callable[[Evaluation], Evaluation]
"""Takes what was saved from the figures of an evaluation that could not see it."""


@dataclass(frozen=True)
class Given:
    """What a table gives to its baselines."""

    donor: str
    """The dense model: folder, hub id or GGUF file."""
    calibration_BT: Tensor
    """Training text."""
    after: int = 0
    """Tokens of every block that are a prompt."""
    seed: int = 0


class Baseline(ABC):
    """One bar, at a budget where it takes one."""

    title: str
    """The line of a plot."""
    takes_budget: bool = True

    @abstractmethod
    def on(
        self, model: PreTrainedModel, off: float, given: Given
    ) -> AbstractContextManager[Correct]:
        """While it lasts, a dense model that was just loaded is what this says.

        Args:
            model: changed in place, and used for nothing else afterwards.
            off: share of the neurons (of TEAL, the inputs) that are off; ignored without a budget.
            given: what the table gives.

        Raises:
            ValueError: a budget out of range, or a model that it cannot be done to.
        """


@dataclass(frozen=True)
class ByRecipe(Baseline):
    """The steps of a recipe that trains nothing."""

    title: str
    steps: tuple[dict[str, Any], ...]
    takes_budget: bool = True

    @contextmanager
    def on(self, model: PreTrainedModel, off: float, given: Given) -> Iterator[Correct]:
        """Applies the steps."""
        convert_in_memory(model, self.recipe(off), given)
        yield lambda seen: seen

    def recipe(self, off: float) -> Recipe:
        """The steps, at a budget."""
        recipe = parse_recipe({"name": self.title, "steps": list(self.steps)}, self.title)
        return with_options(recipe, target_sparsity=off) if self.takes_budget else recipe


class Teal(Baseline):
    """One share for all matrices."""

    title = "TEAL"

    @contextmanager
    def on(self, model: PreTrainedModel, off: float, given: Given) -> Iterator[Correct]:
        """Drops inputs while the text runs."""
        with inputs_dropped(model, off, given.calibration_BT) as sites:
            yield lambda seen: with_reads(seen, read_shares(sites))


class Griffin(Baseline):
    """The neurons that mattered for the beginning of a block; its figures are those of the rest."""

    title = "GRIFFIN"

    def on(
        self, model: PreTrainedModel, off: float, given: Given
    ) -> AbstractContextManager[Correct]:
        """Selects while the text runs."""
        return measured_by_prompt(model, 1 - off, given.after)


def routed(router: str, spend: str, **options: Any) -> tuple[dict[str, Any], ...]:
    """The steps that give every neuron a score, and every FFN a threshold."""
    attach = {
        "router": router,
        "router_options": options,
        "selector": {"kind": "threshold", "tau": 0.0},
        "tokens": 8192,
    }
    return (
        {"split": {"expert_size": 1, "method": "contiguous"}},
        {"attach": attach},
        {"budget": {"target_sparsity": 0.5, "spend": spend, "tokens": 8192}},
    )


BASELINES: dict[str, Baseline] = {
    "int8": ByRecipe("dense int8", ({"quantize": {"bits": 8}},), takes_budget=False),
    "int4": ByRecipe("dense int4", ({"quantize": {"bits": 4}},), takes_budget=False),
    "teal": Teal(),
    "cats": ByRecipe("CATS", routed("cats", "uniform")),
    "few_bits": ByRecipe("few bits", routed("few_bits", "uniform", bits=4)),
    "griffin": Griffin(),
}


def default_after(after: int | None, names: Sequence[str], block_length: int) -> int:
    """Tokens of every block that are not predicted: as asked, else half of it for griffin."""
    if after is not None:
        return after
    return block_length // 2 if "griffin" in names else 0


def convert_in_memory(model: PreTrainedModel, recipe: Recipe, given: Given) -> None:
    """Does the steps of a recipe that trains nothing to a model, in place.

    Raises:
        ValueError: as the steps.
    """

    def calibration(tokens: int) -> Tensor:
        count = blocks_for(tokens, given.calibration_BT.shape[1])
        return given.calibration_BT[:count].to(model.device)

    def refuse() -> NoReturn:
        raise AssertionError("a baseline trains nothing")

    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), given.donor, given.seed, calibration, refuse, refuse)
        for step in recipe.steps:
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
        ValueError: as `Baseline.on`; or as `evaluate`.
    """
    for name in names:
        bar = BASELINES[name]
        for off in budgets if bar.takes_budget else (0.0,):
            title = f"{name} at {off:g}" if bar.takes_budget else bar.title
            setup = bench.setup
            given = Given(donor, bench.calibration_BT, setup.after, setup.seed)
            change = partial(bar.on, off=off, given=given)
            bench.measure_changed(title, bar.title, change, donor, control)


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
