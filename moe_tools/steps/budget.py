"""Budget: set every selector so that a stated share of the neurons is off.

Letters: T tokens, D model width, F neurons, R experts that are routed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_tools.data.generate import evaluating
from moe_tools.model.conversion import set_selectors
from moe_tools.model.experts import ExpertFFN, every_expert_on, expert_ffns
from moe_tools.model.routing import Routing, record_routing, routing_sparsity
from moe_tools.model.selectors import Selector, tune_selector
from moe_tools.recipe import Budget
from moe_tools.steps.calibrate import check_routed, check_sparsity, model_inputs
from moe_tools.steps.spending import error_curves, spend_by_error

logger = logging.getLogger(__name__)

ROUNDS = 2
"""A mask moves the inputs of the FFNs above it, so what is set on dense activations misses."""
BATCH = 4
"""Blocks of one forward pass."""
CLOSE = 0.02
"""A budget that is missed by more is worth a warning."""


@torch.no_grad()
def budget(model: nn.Module, step: Budget, blocks_BT: Tensor) -> dict[str, Any]:
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
    with every_expert_on(model):
        routings = _watch(model, blocks_BT)
    given = {ffn.name: _off_of_routed(ffn, step.target_sparsity) for ffn in ffns}
    if step.spend == "error":
        seen = {name: sum(r.tokens for r in found) for name, found in routings.items()}
        work = {ffn.name: seen[ffn.name] * ffn.importance().routed_neurons for ffn in ffns}
        saved = sum(given[name] * work[name] for name in given)
        given = spend_by_error(error_curves(model, ffns, blocks_BT), work, saved)
    for _ in range(ROUNDS):
        set_selectors(model, [_tuned(f, routings[f.name], given[f.name]) for f in ffns])
        routings = _watch(model, blocks_BT)
    reached = routing_sparsity([routing for found in routings.values() for routing in found])
    if abs(reached - step.target_sparsity) > CLOSE:
        logger.warning(
            "the budget is %.1f %%, but %.1f %% of the neurons are off: too many scores are equal, "
            "or there are too few experts",
            100 * step.target_sparsity,
            100 * reached,
        )
    return {"sparsity": reached, "given": given}


def _watch(model: nn.Module, blocks_BT: Tensor) -> dict[str, list[Routing]]:
    """Every decision on the text, by FFN."""
    found: dict[str, list[Routing]] = defaultdict(list)
    device = next(model.parameters()).device
    for batch_BT in blocks_BT.split(BATCH):
        with evaluating(model), record_routing(model) as routings:
            model(**model_inputs(model, batch_BT.to(device)))
        for routing in routings:
            found[routing.ffn].append(routing)
    for ffn in expert_ffns(model):
        if ffn.name not in found:
            raise ValueError(f"{ffn.name} saw no calibration token: give more calibration tokens")
    return found


def _tuned(ffn: ExpertFFN, routings: Sequence[Routing], off: float) -> Selector:
    """The FFN's selector with the share `off` of its routed experts off."""
    scores_TR = torch.cat([r.scores_TE.flatten(0, -2)[:, ffn.shared :] for r in routings])
    return tune_selector(ffn.selector, scores_TR, 1 - off)


def _off_of_routed(ffn: ExpertFFN, sparsity: float) -> float:
    """Share of the routed neurons that is off when `sparsity` of all neurons is."""
    return sparsity * ffn.division.neurons / ffn.importance().routed_neurons
