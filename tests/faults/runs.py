"""Whole conversions of a tiny model: recipes of every step, and how two folders are compared."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.names import CONTROL, METRICS, RECIPE, SINGLE, STEPS_FOLDER
from moe_tools.recipe import STEPS, read_recipe
from tests.families import build
from tests.faults.children import Child, Outcome, fork
from tests.tiny import build_tokenizer, write_passages

WHOLE = """
name: whole
steps:
  - train: {mode: dense, tokens: 512, lora: {rank: 2}, checkpoint_every: 2, lr: 1.0e-3}
  - swap: {activation: {kind: drelu}, align: true, tokens: 256}
  - train: {mode: dense, tokens: 512, losses: {lm: 1.0, distill: 0.5}, checkpoint_every: 3}
  - split: {expert_size: 8, tokens: 256}
  - attach: {start_sparsity: 0.1, tokens: 256}
  - train: {mode: straight, tokens: 768, target_sparsity: 0.4, checkpoint_every: 2, lr: 1.0e-3}
  - train: {mode: hard, tokens: 512, accumulate: 2, checkpoint_every: 1, lora: {rank: 2}}
  - budget: {target_sparsity: 0.5, spend: error, tokens: 256}
  - refit: {tokens: 512}
"""
SAMPLES = """
name: samples
data: self
steps:
  - train: {mode: dense, tokens: 256, checkpoint_every: 1}
  - split: {expert_size: 8, by: weights}
  - attach: {router: mlp, selector: {kind: topk, share: 0.5}, when_off: mean, tokens: 256}
  - fit: {tokens: 512, epochs: 2, batch_size: 64}
  - train: {mode: straight, parts: routers, tokens: 256, checkpoint_every: 1}
  - budget: {target_sparsity: 0.5, tokens: 256}
"""
LAYERS = """
name: layers
steps:
  - swap: {activation: {kind: relu}}
  - split: {expert_size: 8, by: marks, shared_experts: 1, tokens: 256}
  - attach: {router: norm, selector: {kind: dynamic_k, tau: 0.9}, tokens: 256}
  - fit: {tokens: 512, epochs: 2, batch_size: 64}
  - refit: {constants: false, tokens: 512}
"""
PAIR = """
name: pair
steps:
  - train: {mode: dense, tokens: 512, checkpoint_every: 2}
  - split: {expert_size: 8, tokens: 256}
  - attach: {start_sparsity: 0.1, tokens: 256}
  - train: {mode: straight, tokens: 1024, target_sparsity: 0.4, checkpoint_every: 2, lr: 1.0e-3}
"""
FEW = """
name: few
steps:
  - quantize: {bits: 8}
  - split: {expert_size: 1, method: contiguous}
  - attach: {router: few_bits, router_options: {bits: 4, of: 8},
      selector: {kind: threshold, tau: 0}, tokens: 256}
  - budget: {target_sparsity: 0.5, tokens: 256}
  - refit: {tokens: 512}
  - threshold: {target_sparsity: 0.2, where: all, spend: greedy, rotate: true, tokens: 256}
"""
PROMPT = """
name: prompt
steps:
  - train: {mode: dense, tokens: 256, checkpoint_every: 1}
  - select: {by: prompt, share: 0.5}
"""
CLOCKS = (
    "seconds",
    "tokens_per_second",
    "mfu",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
)
COMPLETE = "complete, at most its table is not printed"
RESTARTED = ("loss", "train_loss")
"""Figures of metrics.json that two runs need not share: times, and means that transformers begins
anew where it resumes."""


@dataclass(frozen=True)
class Run:
    """A command that converts the donor; the same command resumes."""

    name: str
    recipe: str
    """Its YAML."""
    verb: str = "convert"
    options: tuple[str, ...] = ("--control",)
    processes: int = 1

    def start(self, work: Path, output: Path) -> list[Child]:
        """Starts it on the donor in `work`, in as many processes as it has."""
        file = work / f"{self.name}.yaml"
        recipe = ["--recipe", str(file)] if self.verb == "convert" else [str(file)]
        words = [self.verb, *recipe, "--model", str(work / "donor")]
        words += ["--output", str(output), "--block-length", "16", "--dtype", "fp32"]
        words += ["--device", "cpu", *self.options]
        if "data: self" not in self.recipe:
            words += ["--data", str(work / "text.txt")]
        if self.verb == "convert":
            words += ["--eval-tokens", "64"]
        return [fork(lambda: main(words), env=env) for env in self._ranks()]

    def _ranks(self) -> list[dict[str, str]]:
        if self.processes == 1:
            return [{}]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared["WORLD_SIZE"] = str(self.processes)
        ranks = [str(rank) for rank in range(self.processes)]
        return [{"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in ranks]

    def finish(self, work: Path, output: Path, *, seconds: float = 300) -> list[Outcome]:
        """Runs it to its end; where the first process fails, the others are ended, as torchrun
        does."""
        first, *others = self.start(work, output)
        ended = [first.end(seconds)]
        if ended[0].code:
            for other in others:
                other.kill()
        return ended + [other.end(seconds) for other in others]


RUNS = (
    Run("whole", WHOLE),
    Run("samples", SAMPLES),
    Run("layers", LAYERS, options=("--stream",)),
    Run("few", FEW, options=()),
    Run("prompt", PROMPT),
    Run("pair", PAIR, verb="train", processes=2),
)


def prepare(work: Path) -> None:
    """Writes the donor, its text and the recipes; together these have every step there is."""
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    save(build("llama", bos_token_id=1, eos_token_id=1), work / "donor", build_tokenizer())
    write_passages(work / "text.txt", 400)
    used = set()
    for run in RUNS:
        (work / f"{run.name}.yaml").write_text(run.recipe)
        used |= {step.verb for step in read_recipe(work / f"{run.name}.yaml").steps}
    assert used == set(STEPS), f"no run has the steps {set(STEPS) - used}"


def differences(one: Path, other: Path) -> list[str]:
    """Files of two runs that are not the same, bit by bit; clocks aside."""
    files = [
        {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        for folder in (one, other)
    ]
    found = sorted(files[0].keys() ^ files[1].keys())
    for name in sorted(files[0].keys() & files[1].keys()):
        mine, theirs = files[0][name], files[1][name]
        if Path(name).name == METRICS:
            pair = (json.loads(file.read_text()) for file in (mine, theirs))
            found += [f"{name}: {place}" for place in _figures(*pair)]
        elif mine.read_bytes() != theirs.read_bytes():
            found.append(name)
    return found


def _figures(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two contents of metrics.json differ, and how."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other} - {*CLOCKS, *RESTARTED}):
            yield from _figures(one.get(key), other.get(key), f"{place}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _figures(*pair, f"{place}[{index}]")
    elif one != other:
        yield f"{place} is {other!r} in place of {one!r}"


def phase(output: Path) -> str:
    """How far a run came that was killed: the step, and whether it worked or wrote."""
    if not (output / RECIPE).is_file():
        return "before the first file"
    if (output / METRICS).is_file():
        return COMPLETE
    if (output / CONTROL / RECIPE).is_file() and not (output / CONTROL / METRICS).is_file():
        return f"control, {phase(output / CONTROL)}"
    if (output / SINGLE).is_file() or (output / CONTROL / METRICS).is_file():
        return "finishing"
    steps = output / STEPS_FOLDER
    names = sorted(os.listdir(steps)) if steps.is_dir() else []
    ways: dict[str, Callable[[str], bool]] = {
        "writing": lambda name: name.startswith(".") and name.endswith(".partial"),
        "inside": lambda name: name.endswith(".work"),
    }
    for way, fits in ways.items():
        for name in names:
            if fits(name):
                return f"{way} {name.strip('.').partition('.')[0]}"
    done = [name for name in names if name[0].isdigit()]
    return f"after {done[-1]}" if done else "before the first step"
