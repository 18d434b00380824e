"""The tables of docs/scale.md, made by the code that `--dry-run` prints.

`python -m tests.docs.scale_tables` writes them into the page; `test_scale.py` compares.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig

from moe_tools.cli.dry_run import duration, gigabytes, seconds
from moe_tools.measure.gpus import GPUS
from moe_tools.recipe import Recipe, Train, known_recipes, read_recipe
from moe_tools.runs.plan import Machine, Need, Plan, plan
from tests.published import CONFIGS, OF_RECIPE

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
NODES = (1, 8, 64)
LONGEST = 31 * 24
"""Hours that a run may take before the next larger machine is told."""
SHARDED = ("0", "1", "2", "3")


# --- the papers' recipes


def on(recipe: Recipe, count: int, *, recomputed: bool) -> Recipe:
    """A recipe for so many processes: its batch stays, as far as `accumulate` can be divided."""
    steps = tuple(
        replace(
            step,
            accumulate=max(1, round(step.accumulate / count)),
            checkpointing=step.checkpointing or recomputed,
        )
        if isinstance(step, Train)
        else step
        for step in recipe.steps
    )
    return replace(recipe, steps=steps)


def laid(recipe: Recipe, model: str) -> tuple[Plan, Need | None, bool]:
    """The plan on the smallest machine that it fits, how states are divided, and if recomputed."""
    for count in NODES:
        for recomputed in (False, True):
            given = on(recipe, count, recomputed=recomputed)
            found = plan(given, model, machine=Machine(processes=count))
            if not found.needs:
                return found, None, False
            fitting = [need for need in found.needs if need.way in SHARDED and need.fits]
            last = count == NODES[-1]
            if fitting and (found.hours <= LONGEST or last):
                return found, fitting[0], recomputed
    raise AssertionError(f"{recipe.name} fits nowhere")


def recipe_rows(models: Path) -> Iterator[str]:
    """A row for every paper's recipe."""
    for name, file in known_recipes().items():
        if Path(file).parent.name != "papers":
            continue
        found, need, again = laid(read_recipe(file), str(models / OF_RECIPE[name]))
        text = sum(source.disk for source in found.data)
        cells = ["-"] * 8
        if need is not None:
            how = f"ZeRO-{need.way}" + (", recomputed" if again else "")
            cells = [
                f"{found.flops:.2e}",
                f"{found.processes}",
                duration(found.hours),
                how,
                gigabytes(need.gpu),
                gigabytes(need.host) if need.host else "-",
                seconds(found.step_seconds),
                f"{gigabytes(need.sent)}, {seconds(need.sending)}" if need.sent else "-",
            ]
        tokens = f"{found.tokens:,}" if found.tokens else "-"
        disk = [
            gigabytes(size) if size else "-" for size in (found.checkpoints, found.folder, text)
        ]
        yield "| " + " | ".join([f"`{name}`", tokens, *cells, *disk]) + " |"


RECIPES = [
    "recipe",
    "tokens",
    "FLOPs",
    "A100-80GB",
    "time",
    "states",
    "on a GPU",
    "on a host",
    "a step computes",
    "and sends",
    "checkpoints",
    "folder",
    "text",
]


# --- published runs


@dataclass(frozen=True)
class Published:
    """A training run whose cost somebody printed."""

    config: PreTrainedConfig
    tokens: float
    length: int
    gpu: str
    hours: float
    """Of one card: of all together."""
    source: str


def llama(**sizes: int) -> LlamaConfig:
    return LlamaConfig(architectures=["LlamaForCausalLM"], **sizes)


TINY = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
TINY |= {"num_attention_heads": 32, "num_key_value_heads": 4}
LLAMA3 = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA3 |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
L7, L13 = CONFIGS["llama2-7b"][0], CONFIGS["llama2-13b"][0]
PUBLISHED = {
    "LLaMA-13B": Published(L13, 1e12, 2048, "A100-80GB", 135_168, "arXiv 2302.13971"),
    "LLaMA-2-7B": Published(L7, 2e12, 4096, "A100-80GB", 184_320, "arXiv 2307.09288"),
    "LLaMA-2-13B": Published(L13, 2e12, 4096, "A100-80GB", 368_640, "arXiv 2307.09288"),
    "Llama-3-8B": Published(llama(**LLAMA3), 15e12, 8192, "H100-80GB", 1.3e6, "its model card"),
    "TinyLlama-1.1B": Published(
        llama(**TINY), 3e12, 2048, "A100-40GB", 16 * 90 * 24, "its model card, before the run"
    ),
    "ProSparse-7B": Published(
        L7,
        34_603_008_000,
        4096,
        "A100-80GB",
        8 * 10 * 24,
        "its card: 8 A100; 10 days: hearsay",
    ),
}
"""What was trained -> what was printed. A token is counted once, whatever was recomputed."""


def planned(run: Published, folder: Path) -> Plan:
    """What this code says of a published run: a plain training of all weights."""
    run.config.save_pretrained(folder)
    recipe = Recipe("x", (Train(tokens=round(run.tokens)),), block_length=run.length)
    return plan(recipe, str(folder), machine=Machine(gpu=run.gpu))


def utilisation(run: Published, flops: float) -> float:
    """The share of the cards' FLOP/s that the hours imply."""
    return flops / (run.hours * 3600 * GPUS[run.gpu].flops)


def published_rows(models: Path) -> Iterator[str]:
    """A row for every published run."""
    for name, run in PUBLISHED.items():
        found = planned(run, models / name)
        share = utilisation(run, found.flops)
        cells = [
            f"{run.tokens:.3g}",
            f"{found.flops:.2e}",
            f"{6 * found.parameters * run.tokens:.2e}",
            f"{run.hours:,.0f} {run.gpu}",
            f"{share:.2f}",
            run.source,
        ]
        yield "| " + " | ".join([name, *cells]) + " |"


RUNS = ["run", "tokens", "FLOPs here", "6 N D", "card hours", "utilisation", "source"]


# --- the page


def table(headings: list[str], rows: Iterator[str]) -> str:
    line = "|" + "|".join("---" for _ in headings) + "|"
    return "\n".join(["| " + " | ".join(headings) + " |", line, *rows])


def tables() -> dict[str, str]:
    """Name of a table -> its lines."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        for name, (config, _) in CONFIGS.items():
            config.save_pretrained(models / name)
        return {
            "recipes": table(RECIPES, recipe_rows(models)),
            "runs": table(RUNS, published_rows(models)),
        }


def written(page: str) -> dict[str, str]:
    """The tables that stand in a page."""
    return dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for kind, lines in tables().items():
        start, end = f"<!-- {kind} -->\n", "\n<!-- end -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = before + start + lines + end + after
    PAGE.write_text(text, encoding="utf-8")
