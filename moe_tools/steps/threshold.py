"""Threshold: small inputs of linears are dropped, and the weights that they would read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from moe_tools.experts.conversion import conversion_so_far
from moe_tools.hosts.input_threshold import MOST
from moe_tools.steps.rules import at_least, require
from moe_tools.steps.step import Option, Step, Work
from moe_tools.thresholds.calibration import Plan, calibrate_thresholds, check_plan
from moe_tools.thresholds.rows import Row, put_row, write_rows


@dataclass(frozen=True)
class Threshold(Step):
    """Drops small inputs of the FFNs' linears, and of attentions', by a threshold for each place.

    The weights stay as they are; what changes them, or adds routers, comes before. In a routed FFN
    the threshold on h sees the neurons that the router chose.
    """

    verb = "threshold"
    changes_function = True

    target_sparsity: float
    """Share of the inputs that are dropped, each counted by the weights that it would read; of a
    routed FFN's h, share of what the router left."""
    where: Literal["ffn", "all"] = "ffn"
    """In the FFNs alone; or also in the attentions beside them, never in the head."""
    sites: Literal["both", "input", "hidden"] = "both"
    """What enters gate and up (q, k and v), what enters down (o), or both."""
    spend: Literal["uniform", "greedy"] = "uniform"
    """One share for all places; or, inside each layer, more where it costs less error of the
    layer's output (TEAL, arXiv 2408.14690)."""
    rotate: bool = False
    """Turns what enters gate and up, and q, k and v, along the eigenvectors of its second moment,
    and back after the small numbers are dropped (LaRoSA, arXiv 2507.01299)."""
    tokens: int = 4096
    """Calibration tokens."""

    def check(self) -> None:
        """A share of 0 to `MOST`, and at least one token."""
        at_least(1, self, "tokens")
        share = self.target_sparsity
        require(0 <= share <= MOST, self, "target_sparsity", share, f"in [0, {MOST}]")
        useless = self.rotate and self.sites == "hidden"
        require(not useless, self, "rotate", "true", "false with sites: hidden, which never turn")

    def takes(self, option: Option) -> bool:
        """Only the sparsity."""
        return option == "target_sparsity"

    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Gives the FFNs thresholds that drop nothing; those of attentions need the text."""
        conversion = conversion_so_far(model, donor)
        rows = {}
        for site in check_plan(model, self.plan()):
            rows[site.name] = Row(0.0, 0.0, 0.0, self.rotate and site.role == "input")
            put_row(site, rows[site.name])
        write_rows(model, conversion, rows)

    def apply(self, model: PreTrainedModel, work: Work) -> dict[str, Any]:
        """Finds the thresholds; returns the share of each site, and the layers' errors."""
        conversion = conversion_so_far(model, work.donor)
        found = calibrate_thresholds(model, self.plan(), self.text(work))
        write_rows(model, conversion, found.rows)
        measured = {"shares": {name: row.share for name, row in found.rows.items()}}
        return measured | ({"errors": found.errors} if found.errors else {})

    def plan(self) -> Plan:
        """Its fields but for the text."""
        fields = {key: value for key, value in asdict(self).items() if key != "tokens"}
        return Plan(sparsity=fields.pop("target_sparsity"), **fields)
