"""Converted models beside their donors and their dense controls, on the same tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.checkpoint.loading import is_classifier, is_classifier_source, load, load_tokenizer
from moe_tools.data import Batch, Text, blocks, labelled_batches, labelled_blocks, token_count
from moe_tools.data.holdout import TextSplit
from moe_tools.experts.conversion import read_conversion
from moe_tools.experts.prediction import merge_predictions
from moe_tools.measure.baselines import Baseline, thresholded
from moe_tools.measure.classify import evaluate_classifier
from moe_tools.measure.evaluate import Evaluation, evaluate
from moe_tools.measure.tasks import Tasks, run_tasks
from moe_tools.names import CONFIG, CONTROL, METRICS
from moe_tools.report.report import Role, Row

logger = logging.getLogger(__name__)

CALIBRATION = 8192
"""Training tokens that set the thresholds of the baselines."""


@dataclass(frozen=True)
class Setup:
    """What every row has in common."""

    data: str = "docs"
    """Its held-out part is the text."""
    tokens: int = 32768
    block_length: int = 512
    """Tokens."""
    batch_size: int = 4
    """Blocks of one forward pass."""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    """Which tokens of an encoder's blocks are masked; what tasks draw."""
    tasks: Tasks = field(default_factory=Tasks)
    """Of lm-evaluation-harness, beside the perplexity."""


def compare(sources: Sequence[str], setup: Setup, *, donor: str | None = None) -> list[Row]:
    """Evaluates model folders, each beside its donor and its `control` folder, if it has them.

    Perplexities are comparable only over the same tokens: all models must share the tokenizer of
    the first. A donor that only `config.json` names, and that cannot be loaded any more, is left
    out with a warning.

    Args:
        sources: dense or converted models: folders, hub ids or GGUF files.
        setup: text, dtype and device of every row.
        donor: stands in for the donor that each folder names.

    Returns:
        Donors first, then each source after its control; a model that is named twice has one row.

    Raises:
        ValueError: a model that cannot be loaded, another tokenizer, or text that is not there.
        FloatingPointError: a loss that is not finite.
    """
    bench = Bench(setup, sources[0])
    for source in sources:
        bench.measure(source)
    return bench.rows(donor)


class Bench:
    """Evaluates each model once, and sets it beside its donor and its control."""

    def __init__(self, setup: Setup, first: str, classify: bool | None = None) -> None:
        """The model `first` decides what the tokens are, and whether texts are classified."""
        setup.tasks.check()
        self.setup = setup
        self.tokenizer = load_tokenizer(first)
        classify = is_classifier_source(first) if classify is None else classify
        read = _labelled if classify else _blocks
        self.text: Text = read(setup, self.tokenizer, "heldout", setup.tokens)
        self.done: dict[str, Evaluation] = {}
        self.tasks: dict[str, dict[str, float]] = {}
        self.sources: dict[str, str] = {}
        """Name of a row that was asked for -> its folder."""
        self.settings: dict[str, dict[str, float]] = {}
        """Name of a row -> the knob of its selectors, where it is not the saved one."""
        self.series: dict[str, str] = {}
        """Name of a row -> the line of a plot that it belongs to, where that is not the folder."""
        self.controls: dict[str, str | None] = {}
        """Name of a row -> its dense control."""
        self.named_donors: dict[str, str | None] = {}
        self.refused: set[str] = set()
        """Donors that cannot be evaluated."""

    def measure(self, source: str, series: str = "", control: str | None = None) -> None:
        """Loads and evaluates a model, unless that is done."""
        self.sources.setdefault(source, source)
        self.series.setdefault(source, series)
        self.controls.setdefault(source, control or find_control(source))
        self._measure_once(source)

    def _measure_once(self, source: str) -> None:
        if source not in self.done:
            self.evaluate(source, self.load(source))

    def load(self, source: str) -> PreTrainedModel:
        """A model whose tokens are those of the text."""
        _check_tokenizer(source, self.tokenizer)
        model = load(source, dtype=self.setup.dtype, device=self.setup.device)
        if isinstance(self.text, Tensor) == is_classifier(model):
            raise ValueError(f"{source}: classifiers and language models do not compare")
        conversion = read_conversion(model)
        self.named_donors[source] = None if conversion is None else conversion.donor
        return model

    def evaluate(self, name: str, model: PreTrainedModel) -> None:
        """Evaluates a model as it stands, under a name."""
        if not isinstance(self.text, Tensor):
            self.done[name] = evaluate_classifier(model, self.text, title=name)
            self._run_tasks(name, model)
            return
        self.done[name] = evaluate(
            model,
            self.text,
            batch_size=self.setup.batch_size,
            title=name,
            mask_token=self.tokenizer.mask_token_id,
            seed=self.setup.seed,
        )
        self._run_tasks(name, model)

    def _run_tasks(self, name: str, model: PreTrainedModel) -> None:
        setup = self.setup
        if setup.tasks.names:
            self.tasks[name] = run_tasks(
                model, self.tokenizer, setup.tasks, batch_size=setup.batch_size, seed=setup.seed
            )

    def baseline(self, kind: Baseline, sparsity: float, source: str, control: str | None) -> None:
        """Evaluates a donor, or its dense control, under thresholds set on the training text."""
        model, name = self.load(control or source), f"{kind} at {sparsity:g}"
        with thresholded(model, kind, sparsity, self.calibration_BT) as sites:
            self.evaluate(name, model)
        seen = self.done[name]
        saved = sum(site.saved for site in sites) / token_count(self.text)
        flops = replace(seen.flops, ffn=seen.flops.ffn_dense - saved)
        off = saved / seen.flops.ffn_dense
        self.done[name] = replace(seen, flops=flops, ffn_sparsity=off)
        self.sources[name], self.series[name] = source, kind.upper()
        self.controls[name] = control

    @cached_property
    def calibration_BT(self) -> Tensor:
        """Training text."""
        setup, classify = self.setup, not isinstance(self.text, Tensor)
        if classify:
            batches = _labelled(setup, self.tokenizer, "train", CALIBRATION)
            return labelled_blocks(batches, setup.block_length)
        return _blocks(setup, self.tokenizer, "train", CALIBRATION)

    def rows(self, donor: str | None = None) -> list[Row]:
        """Donors first, then each row that was asked for, after its control."""
        if donor is not None:
            self._measure_once(donor)
        folders = dict.fromkeys(self.sources.values())
        donors = {folder: donor or self.find_donor(folder) for folder in folders}
        rows = {name: self.row(name, "donor") for name in donors.values() if name is not None}
        for name, folder in self.sources.items():
            control = self.controls.get(name, find_control(folder))
            if control is not None:
                self._measure_once(control)
                rows.setdefault(control, self.row(control, "control", donors[folder]))
            rows.setdefault(name, self.row(name, "model", donors[folder], control))
        return list(rows.values())

    def find_donor(self, source: str) -> str | None:
        """The donor that a converted folder names, if it can still be evaluated."""
        donor = self.named_donors.get(source)
        if donor is None or donor in self.refused:
            return None
        try:
            self._measure_once(donor)
        except ValueError as error:
            self.refused.add(donor)
            logger.warning("no row for the donor of %s, give --donor: %s", source, error)
            return None
        return donor

    def row(
        self, source: str, role: Role, donor: str | None = None, control: str | None = None
    ) -> Row:
        """One line, relative to a donor and a control."""
        seen, setup = self.done[source], self.setup
        folder = self.sources.get(source, source)

        def ratio(other: str | None) -> float | None:
            if other is None or seen.accuracy is not None:
                return None
            return seen.perplexity / self.done[other].perplexity

        return Row(
            model=source if self.series.get(source) else folder,
            role=role,
            series=self.series.get(source, ""),
            setting=self.settings.get(source, {}),
            perplexity=seen.perplexity,
            accuracy=seen.accuracy,
            nats_per_token=seen.nats_per_token,
            ratio_to_control=ratio(control),
            ratio_to_donor=ratio(donor),
            ffn_sparsity=seen.ffn_sparsity,
            ffn_dense_flops=seen.flops.ffn_dense,
            ffn_flops=seen.flops.ffn,
            router_flops=seen.flops.router,
            total_flops=seen.flops.total,
            total_dense_flops=seen.flops.total_dense,
            train_tokens=_train_tokens(folder),
            tokens=seen.tokens,
            seconds=seen.seconds,
            data=setup.data,
            block_length=setup.block_length,
            dtype=str(setup.dtype).removeprefix("torch."),
            device=setup.device,
            layer_sparsity=seen.layer_sparsity,
            zeros=seen.zeros,
            tasks=self.tasks.get(source, {}),
            **_prediction(seen),
            two_levels=None if seen.two_levels is None else asdict(seen.two_levels),
            moe_layers={name: asdict(levels) for name, levels in seen.moe_layers.items()},
        )


def _labelled(
    setup: Setup, tokenizer: PreTrainedTokenizerBase, split: TextSplit, tokens: int
) -> list[Batch]:
    return labelled_batches(
        setup.data,
        tokenizer,
        split=split,
        length=setup.block_length,
        batch_size=setup.batch_size,
        tokens=tokens,
    )


def _blocks(
    setup: Setup, tokenizer: PreTrainedTokenizerBase, split: TextSplit, tokens: int
) -> Tensor:
    return blocks(setup.data, tokenizer, split=split, length=setup.block_length, tokens=tokens)


def _check_tokenizer(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        other = load_tokenizer(source)
    except ValueError:
        return  # weights only: the caller says that they belong together
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{source} has another tokenizer than {tokenizer.name_or_path}, so their perplexities "
            "cannot be compared: evaluate them one by one"
        )


def find_control(source: str) -> str | None:
    """The dense control inside a run's folder."""
    folder = Path(source) / CONTROL
    return str(folder) if (folder / CONFIG).is_file() else None


def _prediction(seen: Evaluation) -> dict[str, Any]:
    """The fields of a row that speak of neuron predictors."""
    if not seen.predictions:
        return {}
    overall = merge_predictions(seen.predictions.values())
    each = {name: one.figures() for name, one in seen.predictions.items() if one.seen}
    return {"recall": overall.recall, "precision": overall.precision, "layer_prediction": each}


def _train_tokens(source: str) -> int | None:
    """What the run that wrote a folder says about its training."""
    try:
        metrics = json.loads((Path(source) / METRICS).read_text())
    except (OSError, ValueError):
        return None
    tokens = metrics.get("train_tokens") if isinstance(metrics, dict) else None
    return tokens if isinstance(tokens, int) else None
