"""What is worth doing to a model without training: methods at a few budgets, the cheapest wins.

The price is the bytes of weights that a token reads, because memory is the limit of decoding. A
prompt is another matter: its hundreds of tokens read every weight together, whatever each needs.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from moe_tools.checkpoint.skeleton import skeleton
from moe_tools.data.progress import progress
from moe_tools.experts.conversion import read_block
from moe_tools.measure.unions import SIZES
from moe_tools.recipe import Recipe, read_recipe, recipe_path
from moe_tools.recipe.recipe import STEPS
from moe_tools.report.compare import Bench
from moe_tools.report.report import Row
from moe_tools.report.setup import Setup
from moe_tools.runs.baselines import BASELINES, Baseline, ByRecipe, measure_baseline, quantized
from moe_tools.steps.attach import Attach

ON_GRID = {"few_bits_int8": (4, 8), "few_bits_int4": (3, 4)}
"""Method -> bits of the proposal, the high ones, and bits of the weights that they are part of."""
PREFILL = (
    "Keep the model dense for prefill. Each token needs other neurons, and the tokens of a prompt "
    "need all of them together: every weight is read once for hundreds of tokens, so that nothing "
    "is saved in bytes, and arithmetic is the limit. int8 or int4 weights keep their smaller size "
    "in memory there, too."
)


@dataclass(frozen=True)
class Use:
    """What a model is to do."""

    kind: Literal["decode", "prefill"]
    sequences: int = 1
    """That take their next token together."""

    @classmethod
    def parse(cls, word: str) -> Use:
        """Reads decode, prefill or batch:N.

        Raises:
            ValueError: another word, or a number of sequences that no table has.
        """
        if word in ("decode", "prefill"):
            return cls(word)  # type: ignore[arg-type]
        name, _, number = word.partition(":")
        known = [str(size) for size in SIZES]
        if name != "batch" or number not in known:
            raise ValueError(
                f"{word!r} is no use: decode, prefill, or batch:N with N of {', '.join(known)}"
            )
        return cls("decode", int(number))


@dataclass(frozen=True)
class Choice:
    """What was found."""

    rows: tuple[Row, ...]
    """The dense model first, then every method at every budget."""
    chosen: Row
    """The cheapest within the loss; the dense model, where nothing is."""
    commands: tuple[str, ...]
    """How to make it, if there is something to make, and to run it."""
    recipe: str = ""
    """YAML that the first command reads as recipe.yaml; "": it needs none."""


def methods() -> dict[str, Baseline]:
    """Name -> every method that is tried: dense, alone, and on top of stored weights."""
    alone = ("int8", "int4", "few_bits", "teal", "cats")
    return {name: BASELINES[name] for name in alone} | {
        name: ByRecipe(f"few bits on int{of}", partial(on_grid, bits, of))
        for name, (bits, of) in ON_GRID.items()
    }


def on_grid(bits: int, of: int) -> Recipe:
    """The recipe `prox` on weights that are stored in `of` bits, whose high `bits` propose."""
    recipe = read_recipe(recipe_path("prox"))
    options: dict[str, Any] = {"bits": bits, "of": of}
    steps = [
        replace(step, router_options=step.router_options | options)
        if isinstance(step, Attach)
        else step
        for step in recipe.steps
        if not step.trains
    ]
    rounding: Any = STEPS["quantize"]
    return replace(recipe, name=f"prox-int{of}", steps=(rounding(bits=of), *steps))


def recommend(
    source: str, setup: Setup, budgets: Sequence[float], max_loss: float, use: Use
) -> Choice:
    """Measures every method at every budget, and chooses.

    Args:
        source: a dense causal or masked language model: folder, hub id or GGUF file.
        setup: text, dtype and device.
        budgets: shares of the neurons (teal: of the inputs) that are off.
        max_loss: perplexity over the dense model's that is accepted.
        use: decoding, by how many sequences together; not prefill, of which `PREFILL` says all.

    Raises:
        ValueError: no dense language model, a loss below 1, a budget outside (0, 1), too little
            text for so many sequences, or as `evaluate`.
    """
    if not max_loss >= 1:
        raise ValueError(f"--max-loss is {max_loss:g}, but perplexity may grow by 1 times and more")
    for off in budgets:
        if not 0 < off < 1:
            raise ValueError(f"a budget is {off:g}, but must be strictly between 0 and 1")
    bench = Bench(setup, source)
    if bench.classify:
        raise ValueError(f"{source} is a classifier, and --max-loss speaks of perplexity")
    bench.check(source)
    conversion = read_block(skeleton(source).config)
    if conversion is not None:
        raise ValueError(
            f"{source} is converted already: recommend takes a dense model, as {conversion.donor}"
        )
    bench.measure(source)
    read_bytes(bench.rows(source)[0], use)  # known before the methods take their minutes
    with progress("methods", len(methods()), "method") as bar:
        for name, method in methods().items():
            measure_baseline(bench, name, method, budgets, source)
            bar.update()
    rows = bench.rows(source)
    chosen = choose(rows, max_loss, use)
    return Choice(tuple(rows), chosen, *commands(chosen, source, setup.data))


def choose(rows: Sequence[Row], max_loss: float, use: Use) -> Row:
    """The row of the fewest bytes within the loss; of equals the first.

    Raises:
        ValueError: the text was too short to say what so many sequences read.
    """
    within = [row for row in rows if (row.ratio_to_donor or 1.0) <= max_loss]
    return min(within, key=lambda row: read_bytes(row, use))


def read_bytes(row: Row, use: Use) -> float:
    """Bytes that a pass over the next token of each sequence reads.

    Raises:
        ValueError: as `choose`.
    """
    if use.sequences == 1:
        assert row.total_bytes is not None
        return row.total_bytes
    if str(use.sequences) not in row.together:
        raise ValueError(
            f"the batches of the text have too few tokens to say what {use.sequences} sequences "
            "read: give more --tokens"
        )
    return row.together[str(use.sequences)]["total"]


def commands(row: Row, source: str, data: str) -> tuple[tuple[str, ...], str]:
    """How to make and run what a row measured, and the recipe that is read for it, as YAML."""
    model = shlex.quote(source)
    if row.role == "donor":
        return (f"moe-tools generate {model}",), ""
    name, _, off = row.model.partition(" at ")
    convert = f"--model {model} --output DIR"
    convert += f" --target-sparsity {off}" if off else ""
    convert += f" --data {shlex.quote(data)}" if data != "docs" else ""
    generate = "moe-tools generate DIR"
    if not off:
        bits = 8 if name.endswith("int8") else 4
        recipe, generate = quantized(bits)(), f"{generate} --optimize --linears int{bits}"
    elif name in ON_GRID:
        recipe = on_grid(*ON_GRID[name])
    else:
        known = "prox" if name == "few_bits" else name
        return (f"moe-tools convert --method {known} {convert}", generate), ""
    return (f"moe-tools convert --recipe recipe.yaml {convert}", generate), recipe.to_yaml()
