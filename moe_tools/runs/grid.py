"""Every split with every router at every sparsity, on one donor that is not trained.

Which split and which router to choose depends on the model. Nothing is saved but the figures, a
line of JSON each, so that a killed grid goes on where it stopped.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_tools.checkpoint.loading import load, load_tokenizer
from moe_tools.data import blocks, fingerprint
from moe_tools.data.packing import blocks_for
from moe_tools.data.sources import absolute
from moe_tools.disk import writing
from moe_tools.experts.conversion import conversion_so_far
from moe_tools.experts.routers import ROUTERS
from moe_tools.lock import locked
from moe_tools.measure.evaluate import Evaluation, evaluate
from moe_tools.recipe import parse_recipe
from moe_tools.runs.baselines import BASELINES, Given
from moe_tools.steps.attach import Attach, attach
from moe_tools.steps.budget import Budget, budget
from moe_tools.steps.fit import Fit, fit
from moe_tools.steps.split import Split, split

logger = logging.getLogger(__name__)

SELECTORS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "share": 0.5},
    "threshold": {"kind": "threshold", "tau": 0.5},
    "dynamic_k": {"kind": "dynamic_k", "tau": 0.5},
    "top_p": {"kind": "top_p", "p": 0.5},
}
"""Name -> what the budget then sets the knob of."""
RIDGE = "ridge"
"""A sigmoid router as its closed form leaves it; `sigmoid` is the same router, trained."""
AXES = ("splits", "routers", "sparsities", "baselines", "device")
"""What may differ between two grids of one file."""


@dataclass(frozen=True)
class Grid:
    """What is tried."""

    model: str
    """The donor: a causal language model."""
    splits: tuple[str, ...]
    """`method`, or `kmeans:by`."""
    routers: tuple[str, ...]
    """Kinds of router, or `RIDGE`."""
    sparsities: tuple[float, ...]
    baselines: tuple[str, ...] = ()
    """Of `moe_tools.runs.baselines`, but for griffin, which needs the tokens behind a prompt."""
    expert_size: int = 32
    """Neurons."""
    selector: str = "topk"
    spend: Literal["uniform", "error"] = "uniform"
    when_off: Literal["zero", "mean"] = "zero"
    fit: Fit = field(default_factory=lambda: Fit(tokens=32768, epochs=10, lr=3e-3))
    calibration: int = 8192
    """Training tokens that split, start and set the selectors."""
    data: str = "docs"
    tokens: int = 8192
    """Held-out tokens."""
    block_length: int = 512
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    def describe(self) -> dict[str, Any]:
        """What all figures of one file have in common."""
        everything = asdict(self) | {"dtype": str(self.dtype)}
        return {key: value for key, value in everything.items() if key not in AXES}


Key = tuple[str, str, float]
"""(split, router, target sparsity)."""
DENSE: Key = ("-", "dense", 0.0)


@dataclass(frozen=True)
class Cell:
    """One combination, measured. A baseline has no split; the donor has nothing at all."""

    split: str
    router: str
    target: float
    perplexity: float
    sparsity: float
    """Share of neurons off on the held-out text; of TEAL, of FFN FLOPs saved."""
    ffn_share: float
    """FFN FLOPs, router included, over those of the dense FFNs."""
    recall: float | None = None
    """At half of the experts, mean over the FFNs; see `moe_tools.steps.fit.judge`."""
    captured: float | None = None
    """Share of all output norms that the chosen half has; as recall, on calibration text."""
    text: str = ""
    """Fingerprint of the held-out tokens."""
    run_text: str = ""
    """Fingerprint of the tokens that routers were fitted to."""
    ffn_bytes_share: float | None = None
    """FFN bytes that a token reads, router included, over those of the dense FFNs in bf16; None: of
    a version that counted none."""


def explore(grid: Grid, output: Path) -> list[Cell]:
    """Measures every combination that the file `output` does not have yet; returns all of them.

    Raises:
        ValueError: an unknown word, a file that holds another grid or figures of another text or
            that another process is writing, or a disk that refuses.
    """
    steps = {word: split_step(word, grid) for word in grid.splits}
    for router in grid.routers:
        _ = None if router == RIDGE else ROUTERS[router]
    for target in grid.sparsities:
        if not 0 < target < 1:
            raise ValueError(f"target sparsity is {target}, but must be strictly between 0 and 1")
    wanted: list[Key] = [DENSE, *itertools.product(("-",), grid.baselines, grid.sparsities)]
    wanted += itertools.product(grid.splits, grid.routers, grid.sparsities)
    grid = replace(grid, data=absolute(grid.data))
    bench = _Bench(grid)
    texts = bench.texts
    with writing(output), locked(output):
        done = _read(output, grid)
        for kept in done.values():
            _check_texts(kept, texts, output)
        for key, measured in bench.cells(steps, [key for key in wanted if key not in done]):
            done[key] = cell = replace(measured, text=texts["text"], run_text=texts["run_text"])
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(cell)) + "\n")
            logger.info("%s, %s at %g: perplexity %.2f", *key, cell.perplexity)
    return [done[key] for key in wanted]


def split_step(word: str, grid: Grid) -> Split:
    """`kmeans:marks` -> a split step.

    Raises:
        ValueError: no such method.
    """
    method, _, by = word.partition(":")
    options = {"expert_size": grid.expert_size, "method": method, "tokens": grid.calibration}
    options |= {"by": by} if by else {}
    (step,) = parse_recipe({"name": word, "steps": [{"split": options}]}, word).steps
    assert isinstance(step, Split)
    return step


def _read(output: Path, grid: Grid) -> dict[Key, Cell]:
    """What the file has; a new one begins with what all its figures have in common.

    A last line that was cut, by a full disk or a kill, goes: the next would be glued to it.
    """
    head = json.dumps({"grid": grid.describe()})
    whole, end, cut = output.read_text(encoding="utf-8").rpartition("\n")
    if not whole and head.startswith(cut):
        output.write_text(head + "\n", encoding="utf-8")
        return {}
    first, *lines = whole.split("\n")
    if _lasting(first) != head:
        raise ValueError(f"{output} holds another grid: choose another --output, or its options")
    os.truncate(output, len((whole + end).encode()))
    cells = [Cell(**json.loads(line)) for line in lines if line.endswith("}")]  # not a cut one
    return {(cell.split, cell.router, cell.target): cell for cell in cells}


def _lasting(head: str) -> str:
    """The first line of a file, its text by absolute paths: older ones kept them as given."""
    try:
        grid = json.loads(head)["grid"]
        return json.dumps({"grid": grid | {"data": absolute(grid["data"])}})
    except (ValueError, KeyError, TypeError):
        return head


def _check_texts(kept: Cell, texts: dict[str, str], output: Path) -> None:
    """Refuses a figure of another text."""
    for name, now in texts.items():
        was = asdict(kept)[name]
        if was != now:
            part = {"text": "held-out", "run_text": "training"}[name]
            raise ValueError(
                f"{output} holds figures of the {part} text {was or '(unknown)'}, and the same "
                f"source is {now} now: they do not compare, choose another --output"
            )


class _Bench:
    """The texts of a grid, and how a cell is measured."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def cells(self, steps: dict[str, Split], missing: list[Key]) -> Iterator[tuple[Key, Cell]]:
        """One donor a split, one copy of it a router, one budget a sparsity."""
        for key in missing:
            if key == DENSE:
                yield key, self.cell(key, self.donor())
            elif key[0] == "-":
                yield key, self.baseline(key)
        for word, step in steps.items():
            routers = dict.fromkeys(key[1] for key in missing if key[0] == word)
            if not routers:
                continue
            model = self.donor()
            split(model, step, self.calibration_BT, self.grid.seed)
            for router in routers:
                routed = copy.deepcopy(model)
                judged = self.route(routed, router)
                for key in missing:
                    if key[:2] == (word, router):
                        budget(routed, Budget(key[2], self.grid.spend), self.calibration_BT)
                        yield key, self.cell(key, routed, judged)

    def route(self, model: PreTrainedModel, router: str) -> tuple[float, float]:
        """Attaches and fits; returns mean recall and captured mass at half of the experts."""
        grid = self.grid
        step = Attach(
            router="sigmoid" if router == RIDGE else router,
            selector=SELECTORS[grid.selector],
            start="regression" if router == RIDGE else "open",
            when_off=grid.when_off,
        )
        split = replace(conversion_so_far(model, grid.model), expert_size=grid.expert_size)
        attach(model, step, split, self.train_BT)
        fitting = replace(grid.fit, epochs=0) if router == RIDGE else grid.fit
        with tempfile.TemporaryDirectory() as work:
            found = fit(model, fitting, self.train_BT, Path(work), seed=grid.seed)
        figures = found["routers"].values()
        recall, captured = (
            sum(one[f"{name}_0.5"] for one in figures) / len(figures)
            for name in ("recall", "captured")
        )
        return recall, captured

    def cell(
        self, key: Key, model: PreTrainedModel, judged: tuple[float, float] | None = None
    ) -> Cell:
        """Evaluates a model as it stands."""
        return self.made(key, evaluate(model, self.held_BT), judged)

    def made(self, key: Key, found: Evaluation, judged: tuple[float, float] | None = None) -> Cell:
        """A cell of what was measured."""
        cell = Cell(
            *key, found.perplexity, found.ffn_sparsity, found.flops.ffn_share, *(judged or ())
        )
        return replace(cell, ffn_bytes_share=found.traffic[1].ffn_share)

    def baseline(self, key: Key) -> Cell:
        """Evaluates the donor under thresholds."""
        model, grid = self.donor(), self.grid
        given = Given(grid.model, self.calibration_BT, seed=grid.seed)
        bar = BASELINES[key[1]]
        bar.prepare(model, given)
        with bar.at(model, key[2], given) as correct:
            return self.made(key, correct(evaluate(model, self.held_BT)))

    def donor(self) -> PreTrainedModel:
        """A fresh one."""
        return load(self.grid.model, dtype=self.grid.dtype, device=self.grid.device)

    @cached_property
    def texts(self) -> dict[str, str]:
        """What all cells were measured on and fitted to."""
        return {"text": fingerprint(self.held_BT), "run_text": fingerprint(self.longest_BT)}

    @cached_property
    def held_BT(self) -> Tensor:
        """What is measured on."""
        return self._blocks("heldout", self.grid.tokens)

    @property
    def train_BT(self) -> Tensor:
        """What routers are fitted to."""
        return self.longest_BT[: blocks_for(self.grid.fit.tokens, self.grid.block_length)]

    @property
    def calibration_BT(self) -> Tensor:
        """What splits see and budgets are set on."""
        return self.longest_BT[: blocks_for(self.grid.calibration, self.grid.block_length)]

    @cached_property
    def longest_BT(self) -> Tensor:
        """Both begin alike, and this is the longer one."""
        return self._blocks("train", max(self.grid.fit.tokens, self.grid.calibration))

    def _blocks(self, part: Literal["train", "heldout"], tokens: int) -> Tensor:
        grid = self.grid
        tokenizer = load_tokenizer(grid.model)
        return blocks(grid.data, tokenizer, split=part, length=grid.block_length, tokens=tokens)
