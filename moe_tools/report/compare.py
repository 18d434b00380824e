"""Converted models beside their donors and their dense controls, on the same tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_tools.checkpoint.loading import (
    is_classifier,
    load,
    load_tokenizer,
    prompt_share,
    regresses,
    task_of,
)
from moe_tools.checkpoint.skeleton import skeleton
from moe_tools.data import Batches, Blocks, fingerprint
from moe_tools.data.limits import check_length, check_text, continues_text, says_targets
from moe_tools.data.tasks import HEADS
from moe_tools.experts.conversion import read_conversion
from moe_tools.inference.prompt import select_by_prompt
from moe_tools.measure.by_task import evaluate_task
from moe_tools.measure.evaluate import Evaluation, check_evaluable, evaluate
from moe_tools.measure.probes import check_asked, run_probes
from moe_tools.measure.rows import check_rows, evaluate_rows
from moe_tools.measure.seq2seq import GENERATED
from moe_tools.measure.tasks import run_tasks
from moe_tools.report.by_prompt import measured_by_prompt
from moe_tools.report.entries import Entry, find_control, row
from moe_tools.report.report import Row
from moe_tools.report.setup import Setup

logger = logging.getLogger(__name__)


def compare(
    sources: Sequence[str],
    setup: Setup,
    *,
    donor: str | None = None,
    beside: Callable[[Bench], None] | None = None,
) -> list[Row]:
    """Evaluates model folders, each beside its donor and its `control` folder, if it has them.

    Perplexities are comparable only over the same tokens: all models must share the tokenizer of
    the first. A donor that only `config.json` names, and that cannot be loaded any more, is left
    out with a warning.

    Args:
        sources: dense or converted models: folders, hub ids or GGUF files.
        setup: text, dtype and device of every row.
        donor: stands in for the donor that each folder names.
        beside: measures more on the same text, such as baselines.

    Returns:
        Donors first, then each source after its control; a model that is named twice has one row.

    Raises:
        ValueError: a model that cannot be loaded, another tokenizer, or text that is not there.
        FloatingPointError: a loss that is not finite.
    """
    bench = Bench(setup, sources[0])
    for source in sources:
        bench.check_protocol(source)
    for source in sources:
        bench.measure(source)
    if beside is not None:
        beside(bench)
    return bench.rows(donor)


class Bench:
    """Evaluates each model once, and sets it beside its donor and its control."""

    def __init__(self, setup: Setup, first: str) -> None:
        """The model `first` decides what the tokens are, and the task where the setup does not."""
        setup.check()
        self.setup = setup
        self.task = task_of(first) if setup.task is None else setup.task
        self.classify = self.task in HEADS
        """Whether the models have a head on a body that may have none as donor."""
        self.check_protocol(first)
        self.tokenizer = load_tokenizer(first)
        setup.tasks.check_bos(self.tokenizer)
        self.text = setup.text(self.tokenizer, self.task)
        self.entries: list[Entry] = []
        """The models that were asked for, in the order of their rows."""

    def check(self, source: str) -> None:
        """Whether a model, whose weights are not read, could be measured on the text.

        Raises:
            ValueError: it could not.
        """
        model = skeleton(source, task=self.task)
        if isinstance(self.text, Tensor):
            setup, mask_token = self.setup, self.tokenizer.mask_token_id
            check_evaluable(model, self.text, mask_token, setup.after, setup.stride)
        elif isinstance(self.text, Batches):
            check_rows(model, self.text)
        else:
            self._check_kind(source, model)
            check_text(model, self.text)

    def check_protocol(self, source: str) -> None:
        """Whether a model, whose weights are not read, has the perplexity of a protocol.

        And whether it can be asked, where there are probes.

        Raises:
            ValueError: it continues no text, or none as long as a window.
        """
        if self.setup.probes:
            check_asked(skeleton(source, task=self.task))
        if self.setup.protocol is None:
            return
        if self.classify:
            raise ValueError(
                f"classifiers have an accuracy, and --protocol {self.setup.protocol} is a "
                "perplexity: leave it out"
            )
        try:
            model = skeleton(source)
        except ValueError:  # to load it says what is wrong
            return
        if not continues_text(model):
            raise ValueError(
                f"{source} ({type(model).__name__}) does not continue text, and --protocol "
                f"{self.setup.protocol} is the perplexity of models that do: leave it out"
            )
        check_length(model, self.setup.block_length)

    def measure(self, folder: str, series: str = "", control: str | None = None) -> None:
        """Loads and evaluates a model, unless that is done."""
        if all(entry.name != folder for entry in self.entries):
            entry = self._entry(folder, self.load(folder), folder)
            control = control or find_control(folder)
            self.entries.append(replace(entry, series=series, control=control))

    def measure_at(self, setting: dict[str, float], folder: str, model: PreTrainedModel) -> None:
        """Evaluates a model of a folder at another setting of its selectors, as it stands."""
        knobs = ", ".join(f"{knob} {value:g}" for knob, value in setting.items())
        entry = self._entry(f"{folder} at {knobs}", model, folder)
        self.entries.append(replace(entry, setting=setting, control=find_control(folder)))

    def measure_changed(
        self,
        title: str,
        series: str,
        model: PreTrainedModel,
        correct: Callable[[Evaluation], Evaluation],
        donor: str,
        control: str | None,
    ) -> None:
        """Evaluates what a baseline made of a donor, or of its dense control."""
        entry = self._entry(title, model, donor)
        seen = correct(entry.evaluation)
        made = replace(entry, evaluation=seen, series=series, control=control)
        # a classifier's donor may be a body without a head, which has no row
        self.entries.append(replace(made, donor=None if self.classify else donor))

    def load(self, folder: str) -> PreTrainedModel:
        """Loads a model whose tokens are those of the text.

        To one that selects by the prompt every block is a prompt, in which all neurons run, unless
        only what follows a prompt is measured.
        """
        self.check_protocol(folder)
        _check_tokenizer(folder, self.tokenizer)
        selects = prompt_share(folder) is not None
        if selects and not self.setup.after:
            message = "%s selects neurons by the prompt, and every block is one: its row is dense"
            logger.warning(message, folder)
        dtype, device = self.setup.dtype, self.setup.device
        model = load(folder, dtype=dtype, device=device, routed=not selects)
        self._check_kind(folder, model)
        return model

    def _check_kind(self, source: str, model: PreTrainedModel) -> None:
        """Whether a model is of the kind that the task needs.

        Raises:
            ValueError: it is another one.
        """
        if is_classifier(model) != self.classify:
            raise ValueError(f"{source}: classifiers and language models do not compare")
        if self.classify and regresses(model) != (self.task == "regress"):
            raise ValueError(f"{source}: classes and scores do not compare")
        if self.task == "seq2seq" and not says_targets(model):
            raise ValueError(
                f"{source} ({type(model).__name__}) is no encoder-decoder, and says no targets: "
                "leave --task seq2seq out"
            )

    def _entry(self, name: str, model: PreTrainedModel, folder: str) -> Entry:
        """Evaluates a model as it stands."""
        setup, conversion, tasks = self.setup, read_conversion(model), dict[str, float]()
        share = prompt_share(folder)
        selects = conversion is not None and conversion.prompt_share is not None
        if share is None or not selects or not setup.after:
            seen = self._evaluate(name, model)
        else:
            with measured_by_prompt(model, share, setup.after) as correct:
                seen = correct(self._evaluate(name, model))
        given: Any = {"batch_size": setup.batch_size, "seed": setup.seed}
        with nullcontext() if share is None else select_by_prompt(model, share):
            if setup.probes:
                tasks |= run_probes(model, self.tokenizer, setup.probes, **given)
            if setup.tasks.names:
                tasks |= run_tasks(model, self.tokenizer, setup.tasks, **given)
        donor = None if conversion is None else conversion.donor
        return Entry(name, folder, seen, tasks, donor=donor)

    def _evaluate(self, title: str, model: PreTrainedModel) -> Evaluation:
        if isinstance(self.text, Batches):
            return evaluate_rows(model, self.text, title=title)
        if not isinstance(self.text, Tensor):
            return evaluate_task(
                model,
                self.text,
                self.task,
                tokenizer=self.tokenizer,
                generated=self.setup.tasks.limit or GENERATED,
                title=title,
            )
        return evaluate(
            model,
            self.text,
            batch_size=self.setup.batch_size,
            title=title,
            mask_token=self.tokenizer.mask_token_id,
            seed=self.setup.seed,
            after=self.setup.after,
            stride=self.setup.stride,
        )

    @cached_property
    def calibration_BT(self) -> Blocks:
        """Training text for the thresholds of the baselines."""
        return self.setup.calibration_BT(self.tokenizer, self.task)

    def rows(self, donor: str | None = None) -> list[Row]:
        """Returns donors first, then each model that was asked for, after its control."""
        known = {entry.name: entry for entry in reversed(self.entries)}
        donors = self._donors(known, donor)
        same = (self.setup, fingerprint(self.text))
        made = {one.name: row(one, "donor", *same) for one in donors.values() if one}
        for entry in self.entries:
            own, control = donors.get(donor or entry.donor), None
            if entry.control is not None:
                control = self._known(known, entry.control)
                beside = row(control, "control", *same, donor=own)
                made.setdefault(control.name, beside)
            line = row(entry, "model", *same, donor=own, control=control)
            made.setdefault(entry.name, line)
        return list(made.values())

    def _donors(self, known: dict[str, Entry], given: str | None) -> dict[str | None, Entry | None]:
        """Maps the folder of each donor to its entry, or to None if it cannot be evaluated."""
        if given is not None:
            return {given: self._known(known, given)}
        found: dict[str | None, Entry | None] = {}
        for entry in self.entries:
            if entry.donor is None or entry.donor in found:
                continue
            try:
                found[entry.donor] = self._known(known, entry.donor)
            except ValueError as error:
                found[entry.donor] = None
                message = "no row for the donor of %s, give --donor: %s"
                logger.warning(message, entry.folder, error)
        return found

    def _known(self, known: dict[str, Entry], folder: str) -> Entry:
        """Returns the entry of a donor or a control, which is evaluated where `known` lacks it."""
        if folder not in known:
            known[folder] = self._entry(folder, self.load(folder), folder)
        return known[folder]


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
