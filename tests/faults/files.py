"""Hostile and damaged files through every door: one line, nothing run, nothing written, no more
memory than the file is worth."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import moe_tools
from moe_tools.checkpoint.quiet import quiet_transformers
from moe_tools.checkpoint.saving import save
from moe_tools.cli.main import main
from moe_tools.experts.conversion import Conversion
from moe_tools.names import CONFIG, RECIPE
from moe_tools.recipe import read_recipe
from tests.families import EXPERT_SIZE, build, randomize, routed
from tests.faults import hostile, mutations
from tests.faults.children import Outcome, run_child, spread
from tests.faults.gguf_file import write_gguf
from tests.faults.runs import LAYERS, WHOLE
from tests.tiny import build_tokenizer, write_passages

MEMORY = 512 << 20
"""Bytes of address space for what a door does with a small model, beside twice the files."""
SECONDS = 30
"""Of computing; on a good model a door takes less than two."""
PATIENCE = 300
"""Seconds by the clock, on a machine that has other things to do."""
LONGEST = 4000
"""Characters that a reader has to read."""
NO_MEMORY = ("MemoryError", "bad_alloc", "not enough memory", "can't allocate", "out of memory")
FOLDER, SHARDS, GGUF, TEXT = "model", "shards", "model.gguf", "text.txt"
Damage = Callable[[Path], str | None]
"""Changes the files in a folder like `bases`, and says what it changed."""


@dataclass(frozen=True)
class Door:
    """A public entry."""

    name: str
    words: tuple[str, ...] = ()
    """Of the command line, in a folder like `bases`; {} is what is read."""
    call: Callable[[str], object] | None = None
    """Or a function."""

    def open(self, what: str) -> int:
        """The exit code; a ValueError of a function is what 2 is on the command line."""
        if self.call is None:
            return main([word.replace("{}", what) for word in self.words])
        try:
            self.call(what)
        except ValueError as error:
            print(f"moe-tools: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0


LOAD = Door("load", call=moe_tools.load)
DOCTOR = Door("doctor", ("doctor", "{}", "--data", TEXT, "--tokens", "32"))
DRY_RUN = Door("dry run", ("convert", "--recipe", RECIPE, "--model", "{}", "--dry-run"))
TOLD = ("--data", TEXT, "--tokens", "64", "--block-length", "16")
OF_MODELS = (
    LOAD,
    DOCTOR,
    DRY_RUN,
    Door("evaluate", ("evaluate", "{}", *TOLD, "--dtype", "fp32")),
    Door("export", ("export", "{}", "--output", "out/exported")),
    Door("inspect", ("inspect", "{}", "--prompt", "w1 w2 w3", "--html", "out/page.html")),
    Door("generate", ("generate", "{}", "--prompt", "w1", "--chat", "--max-new-tokens", "2")),
)
OF_RECIPES = (
    Door("read_recipe", call=read_recipe),
    Door("dry run", ("convert", "--recipe", "{}", "--model", "donor", "--dry-run")),
)


@dataclass(frozen=True)
class Case:
    """Damaged files and the doors that they are brought to."""

    name: str
    damage: Damage
    what: str
    doors: tuple[Door, ...]


@dataclass(frozen=True)
class Found:
    """What a door said to a case."""

    case: str
    door: str
    code: int | None
    said: str
    faults: tuple[str, ...]


def hostile_files(work: Path, count: int, seed: int, workers: int, *, few: bool) -> Iterator[Found]:
    """Every case by hand at every door, then random damage, each at one door, up to `count`.

    Few: half of them by hand, each at one door.
    """
    prepare(work / "bases")
    marker = work / hostile.MARKER
    cases, draw = [*_by_hand(marker)], random.Random(seed)
    if few:
        cases = draw.sample(cases, count // 2)
        cases = [replace(case, doors=(draw.choice(case.doors),)) for case in cases]
    cases += [_random(draw) for _ in range(count - len(cases))]
    for found in spread(partial(_bring, work, marker), list(enumerate(cases)), workers):
        yield from found


def prepare(bases: Path) -> None:
    """Writes a converted model, the same in shards, a donor, a GGUF file, a recipe and text."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    donor = build("llama", bos_token_id=1, eos_token_id=1)
    save(donor, bases / "donor", tokenizer)
    write_gguf(build("llama", mlp_bias=False), tokenizer, bases / GGUF)
    selector = {"kind": "threshold", "tau": 0.5}
    conversion = Conversion("donor", EXPERT_SIZE, "sigmoid", selector)
    model, _ = routed(donor, conversion)
    randomize(model)
    save(model, bases / FOLDER, tokenizer)
    shutil.copytree(bases / FOLDER, bases / SHARDS)
    (bases / SHARDS / "model.safetensors").unlink()
    with quiet_transformers():
        model.save_pretrained(bases / SHARDS, max_shard_size="20KB")
    write_passages(bases / TEXT, 100)
    (bases / RECIPE).write_text(LAYERS)
    (bases / "whole.yaml").write_text(WHOLE)
    for name in ("out", "outside"):
        (bases / name).mkdir()


def _by_hand(marker: Path) -> Iterator[Case]:
    routed = tuple(door for door in OF_MODELS if door is not DRY_RUN)  # it is no donor
    yield Case("nothing", lambda bases: None, FOLDER, routed)
    yield Case("nothing", lambda bases: None, SHARDS, routed)
    yield Case("nothing", lambda bases: None, "donor", (LOAD, DOCTOR, DRY_RUN))
    yield Case("nothing", lambda bases: None, GGUF, (LOAD, DRY_RUN))
    yield Case("nothing", lambda bases: None, RECIPE, OF_RECIPES)
    for name, harm in hostile.of_folder(marker).items():
        yield Case(name, _on(FOLDER, harm), FOLDER, OF_MODELS)
    for name, text in hostile.recipes(marker).items():
        yield Case(name, _written(text), RECIPE, OF_RECIPES)


def _on(name: str, harm: Callable[[Path], None]) -> Damage:
    return lambda bases: harm(bases / name)


def _written(text: str) -> Damage:
    def write(bases: Path) -> None:
        (bases / RECIPE).write_text(text)

    return write


def _random(draw: random.Random) -> Case:
    own = random.Random(draw.random())
    share = own.random()
    if share < 0.25:
        recipe = own.choice((RECIPE, "whole.yaml"))
        return _case(own, recipe, recipe, mutations.any_recipe, OF_RECIPES)
    if share < 0.4:
        return _case(own, GGUF, GGUF, mutations.any_file, (LOAD, DOCTOR, DRY_RUN))
    if share < 0.5:
        folder, (file, damage) = SHARDS, own.choice(mutations.OF_SHARDS)
    elif share < 0.6:
        folder, (file, damage) = "donor", (CONFIG, mutations.any_json)
    else:
        folder, (file, damage) = FOLDER, own.choice(mutations.OF_FOLDER)
    return _case(own, folder, f"{folder}/{file}", damage, OF_MODELS)


def _case(
    own: random.Random, what: str, file: str, damage: mutations.Damage, doors: tuple[Door, ...]
) -> Case:
    return Case("random", lambda bases: damage(own, bases / file), what, (own.choice(doors),))


def _bring(work: Path, marker: Path, numbered: tuple[int, Case]) -> list[Found]:
    number, case = numbered
    folder = work / f"case-{number}"
    shutil.copytree(work / "bases", folder)
    said = case.damage(folder)
    case = replace(case, name=(said or case.name)[:150])
    found = [_open(folder, marker, case, door) for door in case.doors]
    if not any(each.faults for each in found):
        shutil.rmtree(folder)
    return found


def _open(folder: Path, marker: Path, case: Case, door: Door) -> Found:
    before = _tree(folder)

    def work() -> int:
        os.chdir(folder)
        return door.open(case.what)

    size = sum(size for size, _ in before.values())
    outcome = run_child(work, seconds=PATIENCE, memory=MEMORY + 2 * size, cpu=SECONDS)
    faults = list(_faults(case, outcome))
    if marker.exists():
        faults.append("its code ran")
        marker.unlink()
    after = _tree(folder)
    changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    if changed:
        faults.append(f"wrote {', '.join(changed)}")
    shutil.rmtree(folder / "out")
    (folder / "out").mkdir()
    said = outcome.told[-1][:300] if outcome.told else ""
    name = f"{folder.name}, {case.what}: {case.name}"
    return Found(name, door.name, outcome.code, said, tuple(faults))


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> size and time of every file but those below `out`."""
    found = {}
    for path in folder.rglob("*"):
        state, name = path.lstat(), path.relative_to(folder)
        if stat.S_ISREG(state.st_mode) and name.parts[0] != "out":
            found[str(name)] = (state.st_size, state.st_mtime_ns)
    return found


def _faults(case: Case, outcome: Outcome) -> Iterator[str]:
    if outcome.code in (None, -signal.SIGXCPU, -signal.SIGKILL):
        yield f"took longer than {SECONDS} s"
    elif outcome.code not in (0, 1, 2):
        yield f"exit code {outcome.code}"
    if "Traceback" in outcome.err:
        yield "a traceback"
    elif outcome.code and sum(line.startswith("moe-tools: ") for line in outcome.told) != 1:
        yield f"{len(outcome.told)} lines in place of one"
    if len(outcome.err) > LONGEST:
        yield f"said {len(outcome.err)} characters"
    if any(word in outcome.err for word in NO_MEMORY):
        yield "asked for too much memory"
    if case.name == "nothing" and outcome.code:
        yield "refused what is good"
    if case.name in hostile.REFUSED and outcome.code == 0:
        yield "read what is not to be read"


def report(found: list[Found]) -> Iterator[str]:
    """Lines for a reader."""
    bad = [each for each in found if each.faults]
    codes = Counter(each.code for each in found)
    refused = codes.total() - codes[0]
    yield f"{len(found)} doors: {refused} refused in one line, {codes[0]} read, {len(bad)} faults"
    for each in bad:
        yield f"  FAULT {each.case}"
        yield f"    {each.door}: {'; '.join(each.faults)}: {each.said}"
