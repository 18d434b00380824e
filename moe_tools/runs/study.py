"""Several recipes on one model: the same tokens, the same held-out text, one list of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_tools.checkpoint.block_length import chosen_length
from moe_tools.data.protocols import WINDOW
from moe_tools.data.tasks import HEADS
from moe_tools.lock import held
from moe_tools.recipe import Recipe, read_recipe, recipe_path, with_options
from moe_tools.recipe.options import has_control
from moe_tools.report.compare import Bench
from moe_tools.report.entries import find_control
from moe_tools.report.report import Row
from moe_tools.report.setup import Setup, held_out
from moe_tools.runs.baselines import default_after, measure_baselines
from moe_tools.runs.prepare import prepare
from moe_tools.runs.run import run


@dataclass(frozen=True)
class Study:
    """What is compared, and on what."""

    recipes: tuple[str, ...]
    """Methods that come with moe-tools, or recipe files."""
    model: str
    """The donor."""
    output: Path
    """A folder for the runs: OUTPUT/RECIPE-SPARSITY, with -SEED behind it where seeds are given."""
    sparsities: tuple[float, ...]
    baselines: tuple[str, ...] = ()
    """Of `BASELINES`, at these sparsities; on the dense control where there is one, else on the
    donor."""
    after: int | None = None
    """Only what follows so many tokens of every block is predicted; None: half of a block where
    griffin is a baseline, else 0."""
    tokens: int | None = None
    """Training tokens of each recipe that trains; None: as the recipe says."""
    data: str | None = None
    seeds: tuple[int | None, ...] = (None,)
    """A run of each; None: as the recipe says."""
    eval_tokens: int | None = 32768
    """None: all."""
    protocol: str | None = None
    """Whose text is measured on (`moe_tools.data.protocols`); None: the recipe's, held out."""
    copy: str | None = None
    """Source that stands in for the protocol's data set."""
    window: int | None = None
    """Tokens of a window of the protocol; None: `WINDOW`, or the donor's context if that is
    shorter."""
    stride: int | None = None
    """Tokens from the start of a window to that of the next."""
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"


def compare_recipes(study: Study) -> list[Row]:
    """Runs every recipe at every sparsity, with every seed, and evaluates all beside the donor.

    A recipe with a language loss gets a dense control on the same tokens, once for every seed,
    whose text is its own. Steps that do not depend on the sparsity are done once. The same call
    resumes.

    Raises:
        ValueError: a user's mistake; every recipe is read before the first one runs. Or another
            process is comparing into the same folder.
    """
    with held(study.output):
        return _compare(study)


def _compare(study: Study) -> list[Row]:
    plan = [
        (name, seed, sparsity, _recipe(study, name, sparsity, seed))
        for name in study.recipes
        for seed in study.seeds
        for sparsity in study.sparsities
    ]
    setup = held_out_setup(
        plan[0][-1], tokens=study.eval_tokens, dtype=study.dtype, device=study.device
    )
    if study.protocol is not None:
        length = chosen_length(study.model, study.window, WINDOW)
        setup = replace(
            setup,
            block_length=length,
            protocol=study.protocol,
            copy=study.copy,
            stride=study.stride,
            batch_size=1,
        )
    after = default_after(study.after, study.baselines, setup.block_length)
    setup = replace(setup, after=after)
    bench = Bench(setup, study.model)
    bench.check(study.model)
    first: dict[tuple[str, int | None], Path] = {}
    for name, seed, sparsity, recipe in plan:
        named = "" if seed is None else f"-{seed}"
        folder = study.output / f"{recipe.name}-{sparsity:g}{named}"
        run(
            recipe,
            study.model,
            folder,
            dtype=study.dtype,
            device=study.device,
            control=has_control(recipe) and (name, seed) not in first,
            keep_steps=True,
            like=first.get((name, seed)),
        )
        kept = first.setdefault((name, seed), folder)
        bench.measure(str(folder), series=recipe.name, control=find_control(str(kept)))
    control = next(filter(None, (find_control(str(folder)) for folder in first.values())), None)
    measure_baselines(bench, study.baselines, study.sparsities, study.model, control)
    # a body without a head has no row
    return bench.rows(None if setup.task in HEADS else study.model)


def _recipe(study: Study, name: str, sparsity: float, seed: int | None) -> Recipe:
    recipe = read_recipe(name if Path(name).is_file() else recipe_path(name))
    recipe = with_options(
        recipe,
        target_sparsity=sparsity,
        tokens=study.tokens if recipe.train_steps else None,
        data=study.data,
        seed=seed,
    )
    return prepare(recipe, study.model)


def held_out_setup(recipe: Recipe, *, tokens: int | None, dtype: torch.dtype, device: str) -> Setup:
    """Sets up a table on the held-out part of a recipe's text, in blocks of its length."""
    return Setup(
        data=held_out(recipe.data),
        tokens=tokens,
        block_length=recipe.block_length,
        bos=recipe.bos,
        task=recipe.task,
        dtype=dtype,
        device=device,
    )
