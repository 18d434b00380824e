"""Chooses which inputs are dropped, from calibration text: a threshold for every site.

As in TEAL (arXiv 2408.14690), a threshold is a quantile of what the site is given on dense text,
and shares are spent greedily inside each layer; as in LaRoSA (arXiv 2507.01299), what an FFN and an
attention are given may be turned along the eigenvectors of its second moment first. Every layer is
looked at alone, on what the dense model gives it, its own routers at work.

Letters: B blocks, T tokens, D numbers of a token that enter a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from moe_tools.data import Blocks
from moe_tools.experts.sampling import sample_rows
from moe_tools.hosts.input_threshold import (
    POINTS,
    InputThreshold,
    remove_thresholds,
    switched_on,
    thresholds_in,
)
from moe_tools.thresholds.greedy_shares import greedy_shares
from moe_tools.thresholds.layer_visits import by_key, visit_layers
from moe_tools.thresholds.rows import Row, check_droppable, put_row
from moe_tools.thresholds.sites import (
    ROLES,
    Role,
    Site,
    attention_linears,
    attention_sites,
    ffn_sites,
)

BATCH = 4
"""Blocks of one forward pass; shares are spent on the first of them."""
SAMPLE = 32768
"""Magnitudes of a batch that are kept at each site, to take quantiles of."""
DAMPING = 0.01
"""Added to the second moment, as a share of its mean: directions of no numbers stay in order."""


@dataclass(frozen=True)
class Plan:
    """How many inputs to drop, and where."""

    sparsity: float
    """Share of the inputs that are dropped, each counted by the weights that it would read."""
    where: Literal["ffn", "all"] = "ffn"
    """In the FFNs alone, or in the attentions of their layers, too."""
    sites: Literal["both", "input", "hidden"] = "both"
    """What enters gate and up (q, k and v), what enters down (o), or both."""
    spend: Literal["uniform", "greedy"] = "uniform"
    """One share for all, or in every layer more where it costs less error of its output."""
    rotate: bool = False
    """Turns what enters FFNs and attentions first."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles of its sites."""
        return ROLES if self.sites == "both" else (self.sites,)


@dataclass(frozen=True)
class Calibrated:
    """What was chosen."""

    rows: dict[str, Row]
    """By site."""
    errors: dict[str, float]
    """Layer -> ||y - y_dense||^2 / ||y_dense||^2 of its output y on the first blocks, where shares
    were spent greedily."""


def check_plan(model: nn.Module, plan: Plan) -> list[Site]:
    """Whether a plan fits a model: all that needs no text; returns the sites of its FFNs.

    Raises:
        ValueError: as `calibrate_thresholds`, where that does not depend on the text.
    """
    sites = ffn_sites(model, plan.roles)
    check_droppable(model, sites)
    if plan.where == "all":
        attention_linears(model)
    for site in sites:
        if plan.rotate and not site.shared:
            raise ValueError(
                f"{site.name}: a rotation for each expert of an MoE host would be as large as the "
                "expert: use rotate: false"
            )
    return sites


@torch.no_grad()
def calibrate_thresholds(model: nn.Module, plan: Plan, blocks_BT: Blocks) -> Calibrated:
    """Gives a model thresholds in place; its config stays as it is.

    Args:
        model: dense or routed.
        plan: what to drop.
        blocks_BT: calibration text.

    Raises:
        ValueError: a model without FFNs, one that has thresholds or whose FFNs are optimised, an
            attention that is not found, a rotation of MoE experts, or a site that saw no token.
    """
    sites = check_plan(model, plan)
    if plan.where == "all":
        sites += attention_sites(model, blocks_BT, plan.roles)
    turned = {site.name: plan.rotate and site.role == "input" for site in sites}
    groups = by_key(sites, lambda site: site.group)
    made = {
        site.name: put_row(site, Row(0.0, 0.0, 0.0, turned[site.name], site.paths))
        for site in sites
    }
    try:
        if any(turned.values()):
            _rotate(model, [site for site in sites if turned[site.name]], made, blocks_BT)
        weights = _measure(model, sites, made, blocks_BT)
        shares = dict.fromkeys(groups, plan.sparsity)
        errors: dict[str, float] = {}
        if plan.spend == "greedy":
            work = {group: sum(weights[site.name] for site in own) for group, own in groups.items()}
            shares, errors = _greedy(model, plan, groups, made, work, blocks_BT)
    except BaseException:
        remove_thresholds(model, set(made.values()))
        raise
    rows = {}
    for site in sites:
        threshold, share = made[site.name], shares[site.group]
        threshold.at = threshold.magnitude(share)
        rows[site.name] = Row(
            threshold.at, share, weights[site.name], turned[site.name], site.paths
        )
    return Calibrated(rows, errors)


@contextmanager
def thresholded(model: nn.Module, plan: Plan, blocks_BT: Blocks) -> Iterator[Calibrated]:
    """While it lasts, a model drops its small inputs; then it is as before.

    Raises:
        ValueError: as `calibrate_thresholds`.
    """
    before = set(thresholds_in(model).values())
    found = calibrate_thresholds(model, plan, blocks_BT)
    try:
        yield found
    finally:
        remove_thresholds(model, set(thresholds_in(model).values()) - before)


@dataclass
class _Seen:
    """What one site is given on the text; of many numbers, a sample."""

    site: Site
    rows: int = 0
    magnitudes: list[Tensor] = field(default_factory=list)

    def __call__(self, x_TD: Tensor) -> None:
        values = x_TD.detach().flatten()
        self.rows += x_TD[..., 0].numel()
        if self.site.routed:
            values = values[values != 0]
        self.magnitudes.append(sample_rows(values, SAMPLE).abs().float().cpu())

    def quantiles(self) -> Tensor:
        """`POINTS` of them.

        Raises:
            ValueError: the site was given nothing.
        """
        values = torch.cat([torch.empty(0), *self.magnitudes]).sort().values
        if not len(values):
            raise ValueError(
                f"{self.site.name} saw no calibration token: give more calibration tokens"
            )
        places = torch.linspace(0, len(values) - 1, POINTS).round().long()
        return values[places]


def _measure(
    model: nn.Module, sites: Sequence[Site], made: Mapping[str, InputThreshold], blocks_BT: Blocks
) -> dict[str, float]:
    """Keeps the quantiles of every site; returns what weights it reads for a token, on average."""
    seen = {site.name: _Seen(site) for site in sites}
    tokens = _watch(model, sites, made, blocks_BT, seen, title="measure inputs")
    for site in sites:
        made[site.name].quantiles.copy_(seen[site.name].quantiles())
    return {site.name: site.weights * seen[site.name].rows / tokens[site.layer] for site in sites}


def _rotate(
    model: nn.Module, sites: Sequence[Site], made: Mapping[str, InputThreshold], blocks_BT: Blocks
) -> None:
    """Gives every site the eigenvectors of its second moment as its rotation."""
    moments = {site.name: torch.zeros(site.width, site.width, device=site.device) for site in sites}

    def adding(name: str) -> Callable[[Tensor], None]:
        def add(x_TD: Tensor) -> None:  # the rotation is the identity until all is seen
            x_TD = x_TD.flatten(0, -2).float()
            moments[name].addmm_(x_TD.T, x_TD)

        return add

    _watch(model, sites, made, blocks_BT, {name: adding(name) for name in moments}, title="rotate")
    for name, moment_DD in moments.items():
        moment_DD.diagonal().add_(DAMPING * moment_DD.diagonal().mean())
        made[name].rotation = torch.linalg.eigh(moment_DD).eigenvectors.contiguous()


def _watch(
    model: nn.Module,
    sites: Sequence[Site],
    made: Mapping[str, InputThreshold],
    blocks_BT: Blocks,
    observers: Mapping[str, Callable[[Tensor], None]],
    *,
    title: str,
) -> dict[str, int]:
    """Shows every observer what its site is given; returns the tokens of each layer."""
    by_layer = by_key(sites, lambda site: site.layer)
    tokens = dict.fromkeys(by_layer, 0)

    def see(layer: str, run: Callable[[], Tensor]) -> None:
        with switched_on([made[site.name] for site in by_layer[layer]]):
            tokens[layer] += run()[..., 0].numel()

    for name, observe in observers.items():
        made[name].observers.append(observe)
    try:
        visit_layers(model, list(by_layer), blocks_BT.split(BATCH), see, title=title)
    finally:
        for name in observers:
            made[name].observers.clear()
    return tokens


def _greedy(
    model: nn.Module,
    plan: Plan,
    groups: Mapping[str, Sequence[Site]],
    made: Mapping[str, InputThreshold],
    work: Mapping[str, float],
    blocks_BT: Blocks,
) -> tuple[dict[str, float], dict[str, float]]:
    """Shares by group, and the error of every layer, on the first blocks."""
    layers = by_key(groups, lambda group: groups[group][0].layer)
    shares: dict[str, float] = {}
    errors: dict[str, float] = {}

    def see(layer: str, run: Callable[[], Tensor]) -> None:
        if layer in errors:  # one module that is several layers
            return
        dense = run().float()

        def error(tried: Mapping[str, float]) -> float:
            for group, share in tried.items():
                for site in groups[group]:
                    made[site.name].at = made[site.name].magnitude(share)
            with switched_on([made[site.name] for group in tried for site in groups[group]]):
                return float((run().float() - dense).square().sum() / dense.square().sum())

        own = {group: work[group] for group in layers[layer]}
        found, errors[layer] = greedy_shares(own, plan.sparsity, error)
        shares.update(found)

    visit_layers(model, list(layers), [blocks_BT[:BATCH]], see, title="spend")
    return shares, errors
