"""A model whose linears are given no small numbers: in its modules and in its config's block.

Letters: D numbers of a token that enter a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

import torch
from torch import nn

from moe_tools.experts.conversion import Conversion, read_block, write_conversion
from moe_tools.experts.experts import expert_ffns
from moe_tools.hosts.input_threshold import (
    MOST,
    InputThreshold,
    put_threshold,
    threshold_of,
    thresholds_in,
)
from moe_tools.registry import short
from moe_tools.thresholds.sites import Site, restored_sites
from moe_tools.typed import fits


@dataclass(frozen=True)
class Row:
    """What `thresholds` of the config's block says of one site."""

    at: float
    """Numbers no further from 0 are dropped; 0 drops none."""
    share: float
    """Share of the numbers that this drops on the calibration text."""
    weight: float
    """Matrix weights that the site reads without it, on average over the calibration text's tokens:
    an expert of an MoE host sees some of them."""
    rotated: bool = False
    """They are dropped along the directions of a rotation, which is beside the host's tensors."""
    linears: tuple[str, ...] = ()
    """Paths of the linears; empty for an FFN's, which its name says."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"linears": list(self.linears)}

    @classmethod
    def from_dict(cls, name: str, block: Any) -> Row:
        """Reads `to_dict`.

        Raises:
            ValueError: a value that no field allows.
        """
        known = [entry.name for entry in fields(cls)]
        if not isinstance(block, dict) or set(block) != set(known):
            raise ValueError(f"no threshold: {short(block)} of {name}; it has {', '.join(known)}")
        hints = get_type_hints(cls) | {"linears": list[str]}
        for number in ("at", "share", "weight"):
            hints[number] = float | int
        for key, value in block.items():
            if not fits(value, hints[key]):
                raise ValueError(f"no threshold: {key} of {name} is {short(value)}")
        if not (block["at"] >= 0 and 0 <= block["share"] <= 1 and block["weight"] >= 0):
            raise ValueError(f"no threshold: {name} has a number out of range: {short(block)}")
        return cls(**{**block, "linears": tuple(block["linears"])})


def read_rows(conversion: Conversion | None) -> dict[str, Row]:
    """Site -> its row; empty where nothing is dropped.

    Raises:
        ValueError: as `Row.from_dict`.
    """
    blocks = {} if conversion is None else conversion.thresholds or {}
    return {name: Row.from_dict(name, block) for name, block in blocks.items()}


def check_droppable(model: nn.Module, sites: Sequence[Site]) -> None:
    """Whether small inputs of these sites can be dropped.

    Raises:
        ValueError: some are dropped already, or a routed FFN is optimised, or gives a constant in
            place of what is off.
    """
    for site in sites:
        if any(threshold_of(linear) is not None for linear in site.linears):
            raise ValueError(f"{site.name} has a threshold already: start from the model before it")
    routed = any(site.routed for site in sites)
    for ffn in expert_ffns(model):
        if ffn.packed is not None:
            raise ValueError(f"{ffn.name} is optimised: load it without optimize")
        if routed and ffn.off_F is not None:
            raise ValueError(
                f"{ffn.name} has constants in place of neurons that are off (when_off: mean), "
                "which a threshold would drop: use sites: input"
            )


def put_rows(
    model: nn.Module, rows: Mapping[str, Row], *, empty: bool = False
) -> dict[str, InputThreshold]:
    """Gives the linears of a model the thresholds of these rows, in place.

    Args:
        model: with its routers and activations.
        rows: by site.
        empty: the tensors are shapes on the meta device, as their numbers are in a file.

    Returns:
        Site -> its threshold.

    Raises:
        ValueError: a site that is not there, or as `check_droppable`.
    """
    sites = restored_sites(model, {name: row.linears for name, row in rows.items()})
    check_droppable(model, sites)
    return {site.name: put_row(site, rows[site.name], empty=empty) for site in sites}


def put_row(site: Site, row: Row, *, empty: bool = False) -> InputThreshold:
    """Gives the linears of one site a threshold; arguments are those of `put_rows`."""
    device = torch.device("meta") if empty else site.device
    threshold = InputThreshold(site.name, site.width if row.rotated else None, device)
    threshold.at, threshold.reads = row.at, site.weights // site.width
    put_threshold(site.calls, threshold.train(site.linears[0].training))
    return threshold


def write_rows(model: nn.Module, conversion: Conversion, rows: Mapping[str, Row]) -> None:
    """Says in the config's block what is dropped."""
    blocks = {name: row.to_dict() for name, row in rows.items()}
    write_conversion(model, replace(conversion, thresholds=blocks))


def set_input_sparsity(
    model: nn.Module, sparsity: float, *, start: Mapping[str, Row] | None = None
) -> None:
    """Drops another share of the inputs of a model that has thresholds, in it and in its config.

    A smaller share multiplies those of all sites by one factor; a larger one does so with what each
    is below `MOST`. Thresholds come from the quantiles that were kept: no text is needed.

    Args:
        model: has thresholds.
        sparsity: share of the inputs, each counted by the weights that it would read.
        start: the rows whose shares are moved, e.g. those that were calibrated; by default those
            that the model has now, so that a way there and back may end elsewhere.

    Raises:
        ValueError: the model has no thresholds, or a share outside [0, `MOST`].
    """
    conversion = read_block(model.config)
    rows = read_rows(conversion)
    if not rows or conversion is None:
        raise ValueError(f"{type(model).__name__} has no thresholds to set")
    if not 0 <= sparsity <= MOST:
        raise ValueError(f"sparsity is {sparsity}, but must be in [0, {MOST}]")
    shares = _moved(rows if start is None else start, sparsity)
    by_name = {threshold.site: threshold for threshold in thresholds_in(model).values()}
    for name, share in shares.items():
        at = by_name[name].magnitude(share)
        by_name[name].at = at
        rows[name] = replace(rows[name], at=at, share=share)
    write_rows(model, conversion, rows)


def input_sparsity(rows: Mapping[str, Row]) -> float:
    """Share of the inputs that are dropped, each counted by the weights that it would read."""
    total = sum(row.weight for row in rows.values())
    return sum(row.weight * row.share for row in rows.values()) / (total or 1.0)


def _moved(rows: Mapping[str, Row], sparsity: float) -> dict[str, float]:
    """Shares whose mean is `sparsity`: all nearer to 0, or all nearer to `MOST`, by one factor."""
    now = input_sparsity(rows)
    if sparsity <= now:
        return {name: row.share * sparsity / (now or 1.0) for name, row in rows.items()}
    part = (sparsity - now) / (MOST - now)
    return {name: row.share + part * (MOST - row.share) for name, row in rows.items()}
