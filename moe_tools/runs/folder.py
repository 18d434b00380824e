"""The folder of a run: what is in it, whose it is, and how nothing in it is ever half written.

OUTPUT/                 the converted model: a plain Hugging Face folder
    recipe.yaml         what was run, every default spelled out, and fingerprints of text and donor
    metrics.json        what came of it; written last, so its presence means "complete"
    control/            the dense control, a run folder of its own (on request)
    logs/               what TensorBoard shows (on request)
    steps/              only while the run is not complete, or on request
        0-split/  1-attach/  2-train/    each complete or absent
        2-train.work/                    checkpoints inside a train step
    .lock               only while a run is going on: whose it is

Every file has its whole content when it gets its name, and is on the disk by then.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from moe_tools import processes
from moe_tools.atomic import link, new_file, new_folder, partial_of, remove_folder
from moe_tools.checkpoint.card import write_card
from moe_tools.disk import writing
from moe_tools.lock import LOCK, held
from moe_tools.names import LOGS, METRICS, RECIPE, STEPS_FOLDER
from moe_tools.recipe import Recipe, Train, lasting, lasting_yaml, parse_recipe, read_recipe

PROCESSES = "# processes: "
"""How a line of it begins that says how many processes began the run."""
HEAD = {"text": "# text: ", "donor": "# weights: "}
"""How the first lines of `recipe.yaml` begin; behind it stands a fingerprint."""


@dataclass(frozen=True)
class Pins:
    """What a run depends on beside its words, by fingerprints; "" in a folder of an older version.

    A text or a donor may change under its name, and a run has one of each from start to end.
    """

    text: str = ""
    """See `moe_tools.data.fingerprint`."""
    donor: str = ""
    """See `moe_tools.checkpoint.digest`."""

    def check(self, now: Pins, what: Path, donor: str) -> None:
        """Checks that what `what` began on is still there.

        Raises:
            ValueError: the text or the donor is another one now.
        """
        if self.text != now.text:
            raise ValueError(
                f"{what} was begun on the text {self.text or '(unknown)'}, and the same source is "
                f"{now.text} now: one run has one text, choose another --output"
            )
        if self.donor and self.donor != now.donor:
            raise ValueError(
                f"{what} was begun on the weights {self.donor} of {donor}, and they are "
                f"{now.donor} now: one run has one donor, choose another --output"
            )


@dataclass(frozen=True)
class RunFolder:
    """The output of one recipe on one donor in one dtype."""

    output: Path
    recipe: Recipe
    source: str
    dtype: torch.dtype

    @property
    def identity(self) -> str:
        """What `recipe.yaml` holds: two runs of it on one text write the same weights.

        As it reads when it is read again: 1 epoch and 1.0 are one number.
        """
        words = lasting_yaml(self.recipe.to_yaml())
        return f"# donor: {self.source}\n# dtype: {self.dtype}\n{words}"

    @property
    def steps(self) -> Path:
        """The folder of the steps."""
        return self.output / STEPS_FOLDER

    def step(self, index: int) -> Path:
        """The folder of one step."""
        return self.steps / f"{index}-{self.recipe.steps[index].verb}"

    def logs(self, index: int) -> Path:
        """Where TensorBoard finds a train step: it outlives the step's folder."""
        return self.output / LOGS / self.step(index).name

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keeps other runs out; of several processes of this one, the first has the lock.

        Raises:
            ValueError: another run has the folder, or something else is in it, it is inside the
                donor, or the disk refuses.
        """
        self._check_free()  # before a lock is put there
        if Path(self.source).is_dir() and Path(self.source) in self.output.resolve().parents:
            raise ValueError(
                f"{self.output} is inside the donor {self.source}, which must stay as it is: "
                "choose another --output"
            )
        with writing(self.output), ExitStack() as stack:
            processes.on_first(lambda: stack.enter_context(held(self.output)))
            yield

    def claim(self, check: Callable[[], None], pins: Callable[[], Pins]) -> bool:
        """Takes the folder, which is held, for this run; False when the run is complete already.

        `check` runs before the first file of a new run is written, and may raise. `pins` names text
        and donor as they are now.

        Raises:
            ValueError: the folder holds something else, or was begun on another text or donor.
        """
        marker = self.output / RECIPE
        if marker.is_file():
            began, identity = self.read_marker()
            if identity != self.identity and not self._sees_the_same(identity):
                raise ValueError(
                    f"{self.output} holds another run (see {marker}): choose another --output, or "
                    "repeat that run's options to resume it"
                )
            began.check(pins(), self.output, self.source)
            shutil.rmtree(partial_of(self.steps), ignore_errors=True)  # see `remove_folder`
            return not (self.output / METRICS).is_file()
        self._check_free()
        check()
        with new_file(marker) as partial:
            head = [f"{HEAD[name]}{value}\n" for name, value in asdict(pins()).items()]
            head.append(f"{PROCESSES}{processes.count()}\n")
            partial.write_text("".join(head) + self.identity)
        return True

    def _sees_the_same(self, identity: str) -> bool:
        """Whether a run differs in `accumulate` alone, as it began with other processes.

        accumulate x processes is the same in every train step, so that an optimizer step sees the
        same blocks. Whether a checkpoint can go on so, its train step says.
        """
        began = [line for line in self._head() if line.startswith(PROCESSES)]
        if not began or not began[0].removeprefix(PROCESSES).isdigit():
            return False  # of an older version
        before = int(began[0].removeprefix(PROCESSES))
        comments = [line for line in identity.splitlines() if line.startswith("#")]
        if comments != [line for line in self.identity.splitlines() if line.startswith("#")]:
            return False
        try:
            other = parse_recipe(yaml.safe_load(identity))
        except (ValueError, yaml.YAMLError):
            return False
        return _passes(other, before) == _passes(self.recipe, processes.count())

    def _head(self) -> list[str]:
        """The comments at the head of `recipe.yaml`."""
        lines = (self.output / RECIPE).read_text().splitlines()
        return lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)]

    def _check_free(self) -> None:
        """Checks that nothing but a run is in the folder.

        Raises:
            ValueError: something else is.
        """
        run = (self.output / RECIPE).is_file()
        if not run and self.output.exists() and not _is_free(self.output):
            raise ValueError(f"{self.output} exists and is not empty: choose another --output")

    def read_marker(self) -> tuple[Pins, str]:
        """What the run began on, and its identity."""
        rest, pins = (self.output / RECIPE).read_text(), {}
        for name, begin in HEAD.items():
            if rest.startswith(begin):
                line, _, rest = rest.partition("\n")
                pins[name] = line.removeprefix(begin)
        if rest.startswith(PROCESSES):
            rest = rest.partition("\n")[2]
        return Pins(**pins), lasting_yaml(rest)

    def like(self, output: Path, pins: Callable[[Recipe], Pins]) -> RunFolder | None:
        """Another run on the same donor and the same blocks; None: it is not.

        `pins` names donor and text of a recipe as they are now.

        Raises:
            ValueError: it was, but its text or donor has changed since: this run would see another.
        """
        other = RunFolder(output, lasting(read_recipe(output / RECIPE)), self.source, self.dtype)
        began, identity = other.read_marker()
        if identity != other.identity or not _same_text(self, other):
            return None
        began.check(pins(other.recipe), output, self.source)
        return other

    def adopt(self, other: RunFolder) -> None:
        """Links the steps that another run on the same text did already: those at its start."""
        pairs = zip(self.recipe.steps, other.recipe.steps, strict=False)
        for index, (mine, theirs) in enumerate(pairs):
            if mine != theirs or not other.step(index).is_dir():
                return
            if not self.step(index).is_dir():
                with new_folder(self.step(index)) as partial:
                    for file in other.step(index).iterdir():
                        link(file, partial / file.name)

    def finish(self, keep_steps: bool) -> None:
        """Makes the last step's folder the output, metrics last, and drops the steps."""
        folders = [self.step(index) for index in range(len(self.recipe.steps))]
        for file in sorted(folders[-1].iterdir()):
            if file.name != METRICS:
                link(file, self.output / file.name)
        steps = [json.loads((folder / METRICS).read_text()) for folder in folders]
        tokens = sum(step.get("trained_tokens", 0) for step in steps)
        write_card(self.output, tokens)
        pins, _ = self.read_marker()
        metrics = {
            "recipe": self.recipe.name,
            "donor": self.source,
            "train_tokens": tokens,
            "text": pins.text,
            "seed": self.recipe.seed,
            "but_seed": self._but_seed(pins.donor),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "steps": steps,
        }
        with new_file(self.output / METRICS) as partial:
            partial.write_text(json.dumps(metrics, indent=1))
        if not keep_steps:
            remove_folder(self.steps)

    def _but_seed(self, donor: str) -> str:
        """What two runs share that differ in their seed alone; their texts differ by it, too."""
        words = replace(self.recipe, seed=0).to_yaml()
        return hashlib.sha256(f"{donor}\n{self.dtype}\n{words}".encode()).hexdigest()[:16]


def _same_text(one: RunFolder, other: RunFolder) -> bool:
    """Whether two runs calibrate and train on the same blocks, step by step."""

    def text(folder: RunFolder) -> tuple[object, ...]:
        recipe = folder.recipe
        trained = [step.amount for step in recipe.steps if step.trains]
        read = recipe.data, recipe.block_length, recipe.packing, recipe.bos, recipe.seed
        return (*read, trained)

    return text(one) == text(other)


def _passes(recipe: Recipe, count: int) -> Recipe:
    """The recipe with the passes of all processes together in place of `accumulate`."""
    steps = (
        replace(step, accumulate=step.accumulate * count) if isinstance(step, Train) else step
        for step in recipe.steps
    )
    return replace(recipe, steps=tuple(steps))


def _is_free(folder: Path) -> bool:
    """Nothing is in it, but perhaps what a run left that was killed before its first step."""
    left = {folder / LOCK, partial_of(folder / RECIPE)}
    return folder.is_dir() and set(folder.iterdir()) <= left
