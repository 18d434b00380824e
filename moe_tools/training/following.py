"""Leads the sparsity of a train step to its target, optimizer step by optimizer step.

Letters: S sampled distances.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools import processes
from moe_tools.experts.conversion import read_block
from moe_tools.experts.experts import Routing, expert_ffns
from moe_tools.experts.line import move_line, sample_distances
from moe_tools.experts.selectors import build_selector, describe_selector
from moe_tools.hosts.input_threshold import MOST
from moe_tools.thresholds.rows import input_sparsity, read_rows, set_input_sparsity
from moe_tools.training.controller import Reference, followed
from moe_tools.training.loss_weights import LossWeights

if TYPE_CHECKING:
    from moe_tools.training.train import Train

DAMPING = 0.5
"""Of what one batch says about where the line should be: the next batch says it again."""


class Following:
    """Follows the reference of a train step; without a target it does nothing.

    Either the line between on and off is moved after every optimizer step, or a controller turns
    the weight of a loss.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        step: Train,
        steps: int,
        weights: LossWeights,
        add: Callable[[nn.Parameter, Tensor], None],
    ) -> None:
        """Begins where the model is.

        Args:
            model: that is trained, as the train step finds it.
            step: its target, and how it is reached.
            steps: optimizer steps.
            weights: of its losses; their controller is fed here.
            add: adds to a parameter, wherever it is.
        """
        self.model, self.step, self.steps = model, step, steps
        self.weights, self.add = weights, add
        self.start: float | None = None
        """The sparsity of the first optimizer step, where the reference begins."""
        self.distances: list[Tensor] = []
        """Of the passes of this optimizer step."""
        self.distance_S = torch.empty(0)
        """Those of the optimizer step that ended last, of all processes."""
        self.inputs = read_rows(read_block(model.config))
        """Thresholds on inputs as they are at the start of the step, which `vary` moves too."""

    @property
    def shifts(self) -> bool:
        """Whether the line is moved, and no weight of a loss is turned."""
        return self.step.target_sparsity is not None and self.weights.controller is None

    def note(self, routings: list[Routing]) -> None:
        """Samples the scores of one pass."""
        if routings and self.shifts:
            passes = self.step.accumulate * processes.count()
            self.distances.append(sample_distances(self.model, routings, passes))

    def follow(self, figures: dict[str, float], at: int) -> dict[str, float]:
        """Follows the reference after optimizer step `at`; returns it, for the log.

        Args:
            figures: of that step.
            at: counted from 1.
        """
        if self.step.target_sparsity is None:
            return {}
        measured = followed(figures, self.step.drive)
        if self.start is None:
            self.start = measured
        reference = self._reference().at(at)
        if self.weights.controller is not None:
            self.weights.controller.update(reference, measured)
        if self.shifts:
            self.distance_S = processes.gather_rows(torch.cat(self.distances))
            # what was drawn for this step is left behind at once
            self._move(reference, 1.0 if self.step.vary else DAMPING)
            self._drop_inputs(0.0)
        self.distances = []
        return {"reference": reference}

    def vary(self, at: int) -> None:
        """Moves everything to where the step behind `at` has drawn it, if it draws."""
        if self.shifts and self.step.vary:
            self._move(self._reference().after(at))
            self._drop_inputs(self._drawn(at))

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint has to know."""
        return {
            "start": self.start,
            "controller": self.weights.state(),
            "selectors": [describe_selector(ffn.selector) for ffn in expert_ffns(self.model)],
        }

    def resume(self, saved: dict[str, Any], at: int) -> None:
        """Goes on from what `state` returned after optimizer step `at`."""
        self.start = saved["start"]
        self.weights.resume(saved["controller"])
        if "selectors" in saved:  # older versions have moved no thresholds
            for ffn, spec in zip(expert_ffns(self.model), saved["selectors"], strict=True):
                ffn.selector = build_selector(spec)
        if self.start is not None:
            self._drop_inputs(self._drawn(at))

    def _reference(self) -> Reference:
        step = self.step
        assert self.start is not None and step.target_sparsity is not None
        return Reference(self.start, step.target_sparsity, self.steps, step.ramp, step.vary)

    def _move(self, sparsity: float, damping: float = 1.0) -> None:
        shift = move_line(self.model, self.distance_S, sparsity, damping, self.add)
        if self.step.vary:  # then they are moved once more
            self.distance_S += shift

    def _drawn(self, at: int) -> float:
        """How far the sparsity of the step behind `at` is from the reference."""
        reference = self._reference()
        return reference.after(at) - reference.at(at)

    def _drop_inputs(self, drawn: float) -> None:
        """Lets thresholds on inputs, if any, drop so much more than they did at first."""
        if not self.inputs or not self.step.vary:
            return
        dropped = min(MOST, max(0.0, input_sparsity(self.inputs) + drawn))
        set_input_sparsity(self.model, dropped, start=self.inputs)
