"""Budget: set every selector so that a stated share of the neurons is off.

Letters: T tokens, D model width, F neurons, R experts that are routed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_tools.data import Blocks
from moe_tools.data.generate import evaluating
from moe_tools.experts.conversion import set_selectors, update_config
from moe_tools.experts.experts import ExpertFFN, Routing, every_expert_on, expert_ffns
from moe_tools.experts.line import (
    check_movable,
    check_thresholds,
    distances_of,
    move_line,
)
from moe_tools.experts.routing import observe_routing
from moe_tools.experts.sampling import sample_share
from moe_tools.experts.selectors import (
    Selector,
    describe_selector,
    enough_rows,
    tune_selector,
)
from moe_tools.hosts.inputs import run_layers
from moe_tools.steps.calibrate import check_routed, check_sparsity
from moe_tools.steps.rules import at_least, strictly_between_0_and_1
from moe_tools.steps.spending import error_curves, spend_by_error
from moe_tools.steps.step import Option, Step, Work

logger = logging.getLogger(__name__)

ROUNDS = (2, 5)
"""The fewest and the most: a mask moves the inputs of the FFNs above it, so that what is set on
the activations before it misses."""
SETTLED = 0.002
"""Distance from the sparsity asked for at which no further round is worth a pass over the text."""
SAMPLE = 2**23
"""Scores of all FFNs that say together where one line falls: 32 MB."""
BATCH = 4
"""Blocks of one forward pass."""
CLOSE = 0.02
"""A budget that is missed by more is worth a warning."""


@dataclass(frozen=True)
class Budget(Step):
    """Sets every selector so that a stated share of the neurons is off on calibration text."""

    verb = "budget"
    whole_model = "it sets the selectors of all layers together"

    target_sparsity: float
    """Share of neurons off, over tokens and FFNs."""
    spend: Literal["uniform", "error", "common"] = "uniform"
    """One share for all FFNs; more where it costs less error of the FFN's output; or one shift of
    the line for all of them, which leaves to each the share that training, or a budget before, gave
    it: after `train`, for the sparsity on new text to be what was asked for."""
    tokens: int = 8192
    """Calibration tokens."""

    def check(self) -> None:
        """A share strictly between 0 and 1, of at least one token."""
        at_least(1, self, "tokens")
        strictly_between_0_and_1(self, "target_sparsity")

    def takes(self, option: Option) -> bool:
        """Only the sparsity."""
        return option == "target_sparsity"

    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Needs routers, and experts enough that may be off; spend `common`, thresholds."""
        check_sparsity(check_routed(model, self.verb), self.target_sparsity)
        if self.spend == "common":
            check_thresholds(model)

    def apply(self, model: PreTrainedModel, work: Work) -> dict[str, Any]:
        """Sets the selectors; returns what `budget` measured."""
        return budget(model, self, self.text(work))


@torch.no_grad()
def budget(model: nn.Module, step: Budget, blocks_BT: Blocks) -> dict[str, Any]:
    """Sets the selectors of a converted model, in the model and in its config.

    Spend `error` measures in every FFN, on the donor's activations, how the error of its output
    grows with its sparsity; then it raises the sparsity wherever the next step costs least.

    Returns:
        The sparsity reached on the calibration text; and for every FFN which share of its routed
        experts is off.

    Raises:
        ValueError: the model is dense, or its shared experts alone exceed the budget.
    """
    ffns = check_routed(model, "budget")
    check_sparsity(ffns, step.target_sparsity)
    if step.spend == "common":
        return _budget_common(model, ffns, step.target_sparsity, blocks_BT)
    with every_expert_on(model):
        seen = _watch(model, blocks_BT)
    given = {ffn.name: _off_of_routed(ffn, step.target_sparsity) for ffn in ffns}
    if step.spend == "error":
        work = {ffn.name: seen[ffn.name].tokens * ffn.importance().routed_neurons for ffn in ffns}
        saved = sum(given[name] * work[name] for name in given)
        given = spend_by_error(error_curves(model, ffns, blocks_BT), work, saved)
    before: list[dict[str, Any]] = []
    for done in range(ROUNDS[1]):
        if _settled(ffns, seen, step.target_sparsity, done):
            break
        selectors = [_tuned(f, seen[f.name], given[f.name]) for f in ffns]
        if [describe_selector(one) for one in selectors] == before:
            break  # top-k has no scale that could move
        set_selectors(model, selectors)
        before = [describe_selector(one) for one in selectors]
        seen = _watch(model, blocks_BT)
    return {"sparsity": _reached(ffns, seen, step.target_sparsity), "given": given}


def _budget_common(
    model: nn.Module, ffns: list[ExpertFFN], sparsity: float, blocks_BT: Blocks
) -> dict[str, Any]:
    """Moves the line of all FFNs by one shift, on the activations of the routed model itself."""
    check_movable(model)
    seen = _watch(model, blocks_BT)
    for done in range(ROUNDS[1]):
        if _settled(ffns, seen, sparsity, done):
            break
        scores = {name: torch.cat(one.scores) for name, one in seen.items()}
        move_line(model, distances_of(ffns, scores, SAMPLE), sparsity)
        seen = _watch(model, blocks_BT)
    update_config(model)
    given = {f.name: 1 - seen[f.name].on / (seen[f.name].tokens * f.division.neurons) for f in ffns}
    given = {f.name: _off_of_routed(f, given[f.name]) for f in ffns}
    return {"sparsity": _reached(ffns, seen, sparsity), "given": given}


def _settled(ffns: list[ExpertFFN], seen: Mapping[str, _Seen], sparsity: float, done: int) -> bool:
    """Whether the text is as sparse as it should be, after so many rounds."""
    return done >= ROUNDS[0] and abs(_sparsity(ffns, seen) - sparsity) <= SETTLED


def _reached(ffns: list[ExpertFFN], seen: Mapping[str, _Seen], sparsity: float) -> float:
    """The sparsity on the text, with a warning where it is not the one asked for."""
    reached = _sparsity(ffns, seen)
    if abs(reached - sparsity) > CLOSE:
        logger.warning(
            "the budget is %.1f %%, but %.1f %% of the neurons are off: too many scores are equal, "
            "or there are too few experts",
            100 * sparsity,
            100 * reached,
        )
    return reached


@dataclass
class _Seen:
    """What one FFN decided on the text; of many scores, a sample."""

    tokens: int = 0
    on: int = 0
    """Neurons, summed over the tokens."""
    scores: list[Tensor] = field(default_factory=list)

    def add(self, routing: Routing, tokens: int) -> None:
        """One batch of a text of so many tokens."""
        scores_TE = routing.scores_TE.flatten(0, -2)
        share = enough_rows(scores_TE.shape[-1]) / tokens
        self.scores.append(sample_share(scores_TE, share).clone())
        self.tokens += routing.tokens
        self.on += routing.neurons_on


def _watch(model: nn.Module, blocks_BT: Blocks) -> dict[str, _Seen]:
    """Every decision on the text, by FFN."""
    found = {ffn.name: _Seen() for ffn in expert_ffns(model)}

    def see(routing: Routing) -> None:
        found[routing.ffn].add(routing, blocks_BT.numel())

    with evaluating(model), observe_routing(model, see):
        for batch_BT in blocks_BT.split(BATCH):
            run_layers(model, batch_BT)
    for name, seen in found.items():
        if not seen.tokens:
            raise ValueError(f"{name} saw no calibration token: give more calibration tokens")
    return found


def _tuned(ffn: ExpertFFN, seen: _Seen, off: float) -> Selector:
    """The FFN's selector with the share `off` of its routed experts off."""
    return tune_selector(ffn.selector, torch.cat(seen.scores)[:, ffn.shared :], 1 - off)


def _sparsity(ffns: list[ExpertFFN], seen: Mapping[str, _Seen]) -> float:
    """Share of neurons off, over tokens and FFNs."""
    neurons = sum(seen[ffn.name].tokens * ffn.division.neurons for ffn in ffns)
    return 1 - sum(one.on for one in seen.values()) / neurons


def _off_of_routed(ffn: ExpertFFN, sparsity: float) -> float:
    """Share of the routed neurons that is off when `sparsity` of all neurons is."""
    return sparsity * ffn.division.neurons / ffn.importance().routed_neurons
