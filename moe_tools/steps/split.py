"""Split: decide which neurons share an expert and make experts contiguous. Changes no output.

Letters: T tokens, F neurons, K neurons outside the shared experts, X dimensions of a feature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_tools.data import Blocks
from moe_tools.experts.conversion import Conversion, conversion_so_far, write_conversion
from moe_tools.experts.division import Division
from moe_tools.experts.profiles import Sketch, contributions_TF, marks_TF
from moe_tools.extras import needed
from moe_tools.hosts.ffn import FFN, find_ffns, permute_neurons
from moe_tools.hosts.proof import settle
from moe_tools.steps.calibrate import visit_activations
from moe_tools.steps.graph import coactivation_partition
from moe_tools.steps.partition import (
    Partition,
    contiguous_partition,
    kmeans_partition,
    random_partition,
)
from moe_tools.steps.rules import at_least
from moe_tools.steps.step import Option, Step, Work

CLUSTERING = {"kmeans": "faiss", "coactivation": "pymetis"}
"""Method -> the module that it needs, which not every install has."""
GRAPH_BYTES = 4 * 2**30
"""Co-activation graphs that are summed at once; more of them take another pass over the text."""


@dataclass(frozen=True)
class Split(Step):
    """Which neurons share an expert; reorders them, changes no output."""

    verb = "split"

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

    def check(self) -> None:
        """Sizes are at least 1, shared experts 0 or more."""
        at_least(1, self, "expert_size", "tokens")
        at_least(0, self, "shared_experts")

    @property
    def grouping(self) -> Literal["kmeans", "coactivation", "random", "contiguous"]:
        """The method, but single neurons, which no method puts together, stay where they are."""
        return "contiguous" if self.expert_size == 1 else self.method

    def takes(self, option: Option) -> bool:
        """Only the expert size."""
        return option == "expert_size"

    def needs_text(self) -> bool:
        """Not for splits by weights, by chance or as the neurons stand."""
        grouping = self.grouping
        learns = grouping == "coactivation" or (grouping == "kmeans" and self.by != "weights")
        return learns or self.shared_experts > 0

    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Plans the experts; the neurons stay in their order."""
        for ffn in find_ffns(model):
            planned_division(ffn, self)
        write_conversion(model, self.conversion(conversion_so_far(model, donor)))

    def apply(self, model: PreTrainedModel, work: Work) -> dict[str, Any]:
        """Reorders the neurons; measures nothing."""
        conversion = self.conversion(conversion_so_far(model, work.donor))
        split(model, self, self.text(work), work.seed)
        write_conversion(model, conversion)
        return {}

    def conversion(self, so_far: Conversion) -> Conversion:
        """What a model's config says after the split."""
        return replace(so_far, expert_size=self.expert_size, shared_experts=self.shared_experts)


def split(model: nn.Module, step: Split, blocks_BT: Blocks, seed: int) -> list[Partition]:
    """Reorders the neurons of every FFN in place and returns the partitions, in FFN order.

    Raises:
        ValueError: an expert exceeds an FFN, all experts are shared, an FFN that moe-tools does
            not compute as its host does, or what clusters the neurons is not installed.
    """
    if step.grouping in CLUSTERING:  # now, and not after the calibration
        needed(CLUSTERING[step.grouping], "cluster", f"a split by {step.grouping}")
    settle(model)
    ffns = find_ffns(model)
    divisions = [planned_division(ffn, step) for ffn in ffns]
    orders: list[Tensor] = []
    with tqdm(total=len(ffns), desc="split", disable=None, leave=None) as bar:
        while len(orders) < len(ffns):
            for profile in _profiles(model, ffns, len(orders), step, blocks_BT, seed):
                orders.append(_order_F(profile, divisions[len(orders)], step, seed))
                bar.update()
    for ffn, order_F in zip(ffns, orders, strict=True):  # last: every pass sees the host's order
        permute_neurons(ffn, order_F)
    return [
        Partition(order_F, division.num_experts)
        for order_F, division in zip(orders, divisions, strict=True)
    ]


def planned_division(ffn: FFN, step: Split) -> Division:
    """The sizes that a split would make.

    Raises:
        ValueError: as `split`.
    """
    division = Division.of_size(ffn.neurons, step.expert_size, ffn.name)
    if step.shared_experts >= division.num_experts:
        raise ValueError(
            f"{ffn.name}: {step.shared_experts} of {division.num_experts} experts cannot be shared"
        )
    return division


def _order_F(profile: _Profile, division: Division, step: Split, seed: int) -> Tensor:
    """Shared experts first, of the neurons that fire most often; then the others, by method."""
    often_F = profile.often_F()
    shared = sum(division.sizes[: step.shared_experts])
    rest_K = often_F[shared:].sort().values
    experts = division.num_experts - step.shared_experts
    inner = _partition(profile, rest_K, experts, step, seed)
    return torch.cat([often_F[:shared].sort().values, rest_K[inner.order_F]])


def _partition(
    profile: _Profile, rest_K: Tensor, experts: int, step: Split, seed: int
) -> Partition:
    match step.grouping:
        case "contiguous":
            return contiguous_partition(len(rest_K), experts)
        case "random":
            return random_partition(len(rest_K), experts, seed)
        case "coactivation":
            return coactivation_partition(profile.graph_FF[rest_K][:, rest_K], experts, seed)
        case "kmeans":
            return kmeans_partition(profile.features_FX()[rest_K], experts, seed)


def _profiles(
    model: nn.Module, ffns: list[FFN], first: int, step: Split, blocks_BT: Blocks, seed: int
) -> list[_Profile]:
    """What the text shows of the next FFNs: of all of them, unless their graphs are too large."""
    bytes_each = 4 * max(ffn.neurons for ffn in ffns) ** 2
    fit = max(1, GRAPH_BYTES // bytes_each) if step.grouping == "coactivation" else len(ffns)
    profiles = [_Profile(ffn, step, seed) for ffn in ffns[first : first + fit]]

    def visit(index: int, _: Tensor, h_TF: Tensor) -> None:
        if 0 <= index - first < len(profiles):
            profiles[index - first].add(h_TF)

    if step.needs_text():
        visit_activations(model, blocks_BT, visit, title="calibrate split")
    return profiles


class _Profile:
    """What a split has to know of the neurons of one FFN."""

    def __init__(self, ffn: FFN, step: Split, seed: int) -> None:
        weights = ffn.weights()
        neurons, device = len(weights.up_FD), weights.up_FD.device
        self.step = step
        self.weights = weights
        self.sketch = Sketch(neurons, device, seed)
        self.graph_FF = torch.zeros((neurons, neurons) if step.grouping == "coactivation" else ())
        self.marks_F = torch.zeros(neurons)

    def add(self, h_TF: Tensor) -> None:
        """A batch of hidden activations."""
        contributions = contributions_TF(h_TF, self.weights.down_norm_F)
        if self.step.grouping == "coactivation":
            self.graph_FF += (contributions.T @ contributions).cpu()
        if self.step.grouping == "kmeans" and self.step.by != "weights":
            self.sketch.add(contributions if self.step.by == "activations" else marks_TF(h_TF))
        if self.step.shared_experts:
            self.marks_F += marks_TF(h_TF).sum(0).cpu()

    def features_FX(self) -> Tensor:
        """What k-means compares, a neuron a row."""
        if self.step.by == "weights":  # MoEfication: L2-normalised rows, arXiv 2110.01786
            return nn.functional.normalize(self.weights.routing_FD.detach().float())
        return self.sketch.rows()

    def often_F(self) -> Tensor:
        """The neurons by how many tokens marked them, most first; the host's order if none did."""
        return self.marks_F.argsort(descending=True, stable=True)
