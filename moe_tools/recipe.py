"""A recipe is a list of steps: what a method does to a model, as strict YAML. Imports no torch.

name: lte-smollm2
paper: arXiv 2402.06126
steps:
  - split: {expert_size: 8}
  - attach: {router: sigmoid}
  - train: {mode: soft, tokens: 500_000, target_sparsity: 0.5}
  - train: {mode: hard, tokens: 500_000}
"""

from __future__ import annotations

import itertools
import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar

import yaml

from moe_tools.registry import unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Swap:
    """Another activation in every FFN."""

    activation: dict[str, Any]
    """Its kind and what that takes, e.g. {kind: fatrelu, theta: 0.01}."""
    max_error: float | None = None
    """Chooses theta of fatrelu: in every FFN the largest at which ||y - y_theta||^2 / ||y||^2, of
    its output y on calibration text, is at most this."""
    tokens: int = 8192
    """Calibration tokens; only `max_error` needs them."""


@dataclass(frozen=True)
class Split:
    """Which neurons share an expert; reorders them, changes no output."""

    expert_size: int = 8
    """Neurons of one expert; where it does not divide them, sizes differ by one."""
    method: Literal["kmeans", "coactivation", "random", "contiguous"] = "kmeans"
    by: Literal["activations", "marks", "weights"] = "activations"
    """What k-means sees of a neuron: |h| ||w_down|| on calibration text, the tokens where it is
    one of the 10 largest |h|, or its gate row."""
    shared_experts: int = 0
    """Experts of the neurons that are most often one of the 10 largest; they always run."""
    tokens: int = 4096
    """Calibration tokens."""


@dataclass(frozen=True)
class Attach:
    """A router on every FFN."""

    router: str = "sigmoid"
    router_options: dict[str, Any] = field(default_factory=dict)
    """What the kind of router takes, e.g. `hidden` of a norm router."""
    selector: dict[str, Any] = field(default_factory=lambda: {"kind": "threshold", "tau": 0.5})
    start: Literal["regression", "open"] = "regression"
    """Of sigmoid routers: ridge regression on the donor's own activations, or every expert on."""
    start_sparsity: float = 0.02
    """Share of experts off after the regression, in every layer."""
    when_off: Literal["zero", "mean"] = "zero"
    """What an expert that is off contributes: nothing, or its neurons' calibrated mean."""
    tokens: int = 16384
    """Calibration tokens."""


@dataclass(frozen=True)
class Fit:
    """Trains routers alone, one FFN after the other, on the donor's activations."""

    tokens: int = 65536
    """Calibration tokens; a tenth of them only measures."""
    epochs: int = 10
    """0: routers stay as they are and are only measured."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    batch_size: int = 512
    """Tokens, not blocks."""


@dataclass(frozen=True)
class Budget:
    """Sets every selector so that a stated share of the neurons is off on calibration text."""

    target_sparsity: float
    """Share of neurons off, over tokens and FFNs."""
    spend: Literal["uniform", "error"] = "uniform"
    """The same share in every FFN, or more where it costs less error of the FFN's output."""
    tokens: int = 8192
    """Calibration tokens."""


@dataclass(frozen=True)
class Stage:
    """A part of a train step, and the weight that a loss has at its end."""

    until: float
    """Where it ends, in any unit, e.g. thousands of steps: the last stage ends with the step."""
    weight: float
    curve: Literal["sine", "constant"] = "sine"
    """From the weight of the stage before along half a sine (ProSparse, arXiv 2402.13516), or the
    stage's own weight from its first step. The first stage is constant."""


Weight = float | tuple[Stage, ...]
"""Of a loss: the same in every optimizer step, or led through stages."""


@dataclass(frozen=True)
class Train:
    """Gradient steps on token blocks."""

    tokens: int
    """Training tokens of this step; every step goes on where the last one stopped."""
    mode: Literal["dense", "soft", "straight", "hard"] = "dense"
    """How scores switch experts; see `moe_tools.model.experts.Mode`."""
    losses: dict[str, Weight] = field(default_factory=lambda: {"lm": 1.0})
    """Name of a loss -> its weight, a number or stages. What `drive` turns starts from there."""
    target_sparsity: float | None = None
    """Share of neurons off, over tokens and FFNs, that this step has to reach; under the drives
    l1 and hoyer, of a dense model, the share that is exactly 0."""
    drive: Literal["shift", "eta", "l1", "hoyer"] = "shift"
    """What brings the sparsity there; see `moe_tools.steps.controller`."""
    ramp: float = 0.6
    """Share of the steps in which the target is reached; 0: at once."""
    parts: Literal["all", "ffn", "routers"] = "all"
    """What is trained; `all` and `ffn` include routers, except in hard mode."""
    lr: float = 1e-4
    """Peak learning rate of the host's weights."""
    router_lr: float = 1e-3
    """Peak learning rate of the routers."""
    batch_size: int = 4
    """Blocks of one forward pass on one device."""
    accumulate: int = 1
    """Forward passes of one optimizer step."""
    warmup: float = 0.06
    """Share of the optimizer steps."""
    checkpoint_every: int = 100
    """Optimizer steps, not micro-batches."""


Step = Swap | Split | Attach | Fit | Budget | Train
STEPS: dict[str, type[Step]] = {
    "swap": Swap,
    "split": Split,
    "attach": Attach,
    "fit": Fit,
    "budget": Budget,
    "train": Train,
}


@dataclass(frozen=True)
class Recipe:
    """Steps in order, and the text they share."""

    name: str
    steps: tuple[Step, ...]
    model: str | None = None
    """The donor it was tuned on; any model of a supported family can be given instead."""
    paper: str = ""
    data: str = "docs"
    """Training text: `docs`, a file or folder, a hub dataset, or `self`; to classify, a .jsonl
    file with the fields text and label."""
    task: Literal["lm", "classify"] = "lm"
    """What the loss `lm` is the cross entropy of: the next token, or the label of a whole text."""
    block_length: int = 512
    """Tokens of a block; of a text to classify, at most."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError(f"recipe {self.name}: no steps")
        if self.block_length < 1:
            raise ValueError(f"block_length is {self.block_length}, but must be at least 1")
        for step in self.steps:
            check_step(step)

    def train_tokens(self) -> int:
        """Tokens of all train steps together."""
        return sum(step.tokens for step in self.steps if isinstance(step, Train))

    def to_yaml(self) -> str:
        """The recipe as it can be read again: every default spelled out."""
        block = {key: value for key, value in asdict(self).items() if key != "steps"}
        block["steps"] = [{step_name(step): asdict(step)} for step in self.steps]
        return yaml.safe_dump(block, sort_keys=False)


def step_name(step: Step) -> str:
    """The verb of a step."""
    return next(name for name, kind in STEPS.items() if kind is type(step))


def recipe_path(name: str) -> Path:
    """The file of a recipe that comes with moe-tools.

    Raises:
        ValueError: no recipe of this name.
    """
    found = known_recipes()
    if name not in found:
        raise unknown("recipe", name, found)
    return found[name]


def known_recipes() -> dict[str, Path]:
    """Name -> file, in the order of the names."""
    paths = (Path(str(entry)) for entry in files("moe_tools.recipes").iterdir())
    return {path.stem: path for path in sorted(paths) if path.suffix == ".yaml"}


def read_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file.

    Raises:
        ValueError: no such file, no YAML, an unknown key, a wrong type or a value out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; `moe-tools recipes` lists the recipes there are")
    try:
        block = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    return parse_recipe(block, str(path))


def parse_recipe(block: Any, where: str = "recipe") -> Recipe:
    """A recipe from plain data; every key must be known and of its type.

    Raises:
        ValueError: as `read_recipe`.
    """
    if not isinstance(block, dict):
        raise ValueError(f"{where}: expected keys and values, not {type(block).__name__}")
    steps = block.get("steps")
    if not isinstance(steps, list):
        raise ValueError(f"{where}: `steps` must be a list")
    parsed = tuple(_parse_step(step, f"{where}: step {i}") for i, step in enumerate(steps))
    return _build(Recipe, {**block, "steps": parsed}, where)


def _parse_step(block: Any, where: str) -> Step:
    if not isinstance(block, dict) or len(block) != 1:
        raise ValueError(f"{where}: expected one `verb: {{...}}`")
    ((verb, options),) = block.items()
    if verb not in STEPS:
        raise ValueError(f"{where}: {unknown('step', str(verb), STEPS)}")
    return _build(STEPS[verb], options or {}, f"{where} ({verb})")


def _build(kind: type[T], options: Any, where: str) -> T:
    if not isinstance(options, dict):
        raise ValueError(f"{where}: expected keys and values, not {options!r}")
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{where}: {unknown('key', str(key), known)}")
        if key != "steps":
            options = {**options, key: _convert(value, hints[key], f"{where}: {key}")}
    for item in known.values():
        required = item.default is MISSING and item.default_factory is MISSING
        if required and item.name not in options:
            raise ValueError(f"{where}: `{item.name}` is required")
    return kind(**options)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The value, if it is of the annotated type; an int or a YAML 1e-4 may stand for a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in arguments:
            return None
        listed = isinstance(value, list)
        fits = [kind for kind in arguments if (typing.get_origin(kind) is tuple) == listed]
        return _convert(value, (fits or arguments)[0], where)
    if origin is tuple and isinstance(value, list):
        pairs = enumerate(value)
        return tuple(_convert(item, arguments[0], f"{where}[{i}]") for i, item in pairs)
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: {unknown('value', str(value), map(str, arguments))}")
        return value
    if origin is dict and isinstance(value, dict):
        for key in value:
            _convert(key, arguments[0], f"{where}: key")
        return {key: _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    expected = origin or hint
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {expected.__name__}, not {value!r}")
    return value


AT_LEAST_1 = ("tokens", "expert_size", "batch_size", "accumulate", "checkpoint_every")
SHARES = ("target_sparsity", "start_sparsity", "max_error")
"""Strictly between 0 and 1."""


def check_step(step: Step) -> None:
    """Ranges that a type cannot express.

    Raises:
        ValueError: the key, its value and the rule.
    """
    for item in fields(step):
        value = getattr(step, item.name)
        if item.name in AT_LEAST_1:
            _require(value >= 1, step, item.name, value, "at least 1")
        if item.name in ("lr", "router_lr", "shared_experts", "epochs"):
            _require(value >= 0, step, item.name, value, "0 or more")
        if item.name in ("warmup", "ramp"):
            _require(0 <= value <= 1, step, item.name, value, "in [0, 1]")
        if item.name in SHARES and value is not None:
            _require(0 < value < 1, step, item.name, value, "strictly between 0 and 1")
    if isinstance(step, Train):
        _check_drive(step)
        for name, weight in step.losses.items():
            if isinstance(weight, tuple):
                _check_stages(step, f"losses.{name}", weight)


def _check_drive(step: Train) -> None:
    if step.drive != "shift" and step.target_sparsity is None:
        raise ValueError(f"train: drive {step.drive} needs a target_sparsity to drive to")
    loss = {"eta": "efficiency"}.get(step.drive, step.drive)
    if isinstance(step.losses.get(loss), tuple):
        raise ValueError(f"train: drive {step.drive} sets the weight of {loss}: give it no stages")


def _check_stages(step: Train, key: str, stages: tuple[Stage, ...]) -> None:
    ends = [0.0, *(stage.until for stage in stages)]
    rising = all(before < after for before, after in itertools.pairwise(ends))
    known = rising and 0 < ends[-1] < math.inf
    _require(known, step, f"until of {key}", ends[1:], "rising numbers above 0, at least one")
    for i, stage in enumerate(stages):
        valid = 0 <= stage.weight < math.inf
        _require(valid, step, f"{key}[{i}].weight", stage.weight, "0 or more, and finite")


def _require(holds: bool, step: Step, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{step_name(step)}: {key} is {value}, but must be {rule}")


def with_options(
    recipe: Recipe,
    *,
    target_sparsity: float | None = None,
    expert_size: int | None = None,
    tokens: int | None = None,
    data: str | None = None,
    block_length: int | None = None,
    seed: int | None = None,
) -> Recipe:
    """The recipe under the command line's options; None leaves a value as it is.

    `tokens` is the sum over the train steps, which keep their shares of it.

    Raises:
        ValueError: a value out of range, or an option that no step of the recipe can take.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens is {tokens}, but must be at least 1")
    _require_takers(recipe, target_sparsity, expert_size, tokens)
    shrink = 1.0 if tokens is None else tokens / recipe.train_tokens()

    def change(step: Step) -> Step:
        if isinstance(step, Split) and expert_size is not None:
            return replace(step, expert_size=expert_size)
        if isinstance(step, Train):
            step = replace(step, tokens=max(1, round(step.tokens * shrink)))
        if target_sparsity is not None and _has_target(step):
            step = replace(step, target_sparsity=target_sparsity)
        return step

    return replace(
        recipe,
        steps=tuple(change(step) for step in recipe.steps),
        data=recipe.data if data is None else data,
        block_length=recipe.block_length if block_length is None else block_length,
        seed=recipe.seed if seed is None else seed,
    )


def _has_target(step: Step) -> TypeGuard[Train | Budget]:
    return isinstance(step, Train | Budget) and step.target_sparsity is not None


def _require_takers(
    recipe: Recipe, target_sparsity: float | None, expert_size: int | None, tokens: int | None
) -> None:
    """An option that changes nothing is a mistake."""
    trains = [step for step in recipe.steps if isinstance(step, Train)]
    splits = [step for step in recipe.steps if isinstance(step, Split)]
    targets = [step for step in recipe.steps if _has_target(step)]
    for option, takers, lacks in (
        (target_sparsity, targets, "step with a target_sparsity"),
        (expert_size, splits, "split step"),
        (tokens, trains, "train step"),
    ):
        if option is not None and not takers:
            raise ValueError(f"recipe {recipe.name} has no {lacks}")


def control_recipe(recipe: Recipe) -> Recipe:
    """The dense control: the same train steps on the same text, no router, the language loss alone.

    Raises:
        ValueError: the recipe trains nothing.
    """
    trains = tuple(_dense(step) for step in recipe.steps if isinstance(step, Train))
    if not trains:
        raise ValueError(f"recipe {recipe.name} trains nothing: its dense control is the donor")
    return replace(recipe, name=f"{recipe.name}-control", steps=trains)


def _dense(step: Train) -> Train:
    """What only concerns routers goes back to its default."""
    return Train(
        tokens=step.tokens,
        lr=step.lr,
        batch_size=step.batch_size,
        accumulate=step.accumulate,
        warmup=step.warmup,
        checkpoint_every=step.checkpoint_every,
    )
