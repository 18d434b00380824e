"""Fit: train routers alone, one FFN after the other, on the donor's activations.

Letters: T tokens, D model width, F neurons, R experts that are routed.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_tools.atomic import new_file
from moe_tools.data import Blocks
from moe_tools.experts.experts import ExpertFFN
from moe_tools.experts.prediction import Prediction, merge_predictions
from moe_tools.experts.routers import LearnedRouter
from moe_tools.hosts.moe_host import chosen_share
from moe_tools.steps.activation_cache import DTYPE, ActivationCache
from moe_tools.steps.calibrate import check_routed
from moe_tools.steps.rules import at_least
from moe_tools.steps.schedules import warmup_cosine
from moe_tools.steps.step import Cost, Setting, Step, Work

WARMUP = 0.05
"""Share of the optimizer steps."""
HELD_OUT = 0.1
"""Share of the tokens that only measures."""
DENSITIES = (0.2, 0.5)
"""Shares of the experts at which routers are judged."""


@dataclass(frozen=True)
class Fit(Step):
    """Trains routers alone, one FFN after the other, on the donor's activations."""

    verb = "fit"

    tokens: int = 65536
    """Calibration tokens; a tenth of them only measures."""
    epochs: int = 10
    """0: routers stay as they are and are only measured."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    batch_size: int = 512
    """Tokens, not blocks."""

    def check(self) -> None:
        """Sizes are at least 1, epochs and learning rate 0 or more."""
        at_least(1, self, "tokens", "batch_size")
        at_least(0, self, "epochs", "lr")

    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Only needs routers."""
        check_routed(model, self.verb)

    def apply(self, model: PreTrainedModel, work: Work) -> dict[str, Any]:
        """Trains the routers; returns what `fit` measured."""
        return fit(model, self, self.text(work), work.folder, seed=work.seed)

    def merge(self, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Joins the routers of all layers, and counts their predictions together."""
        return overall(super().merge(measured)["routers"])

    def cost(self, model: PreTrainedModel, setting: Setting) -> Cost:
        """The disk that inputs and targets take."""
        total = 0.0
        for ffn in check_routed(model, self.verb):
            row = ffn.projections.size[1] * DTYPE.itemsize
            if isinstance(ffn.router, LearnedRouter):
                row += ffn.importance().routed * ffn.router.target_dtype.itemsize
            total += chosen_share(model, ffn.name) * self.tokens * row
        return Cost(disk=round(total))


def fit(
    model: nn.Module, step: Fit, blocks_BT: Blocks, work: Path, *, seed: int = 0
) -> dict[str, Any]:
    """Trains the routers of a converted model in place, towards what their kind predicts.

    Routers that need no training are measured, too. A killed fit goes on at the first router that
    is not finished.

    Args:
        model: routed.
        step: how.
        blocks_BT: calibration text; the last tenth of its tokens only measures.
        work: folder of the cached activations and the finished routers.
        seed: of the order of the tokens.

    Returns:
        `routers`: for every FFN, by name: held-out loss, recall and captured mass, see `judge`;
        router FLOPs, over those of the FFN; and of routers over single neurons, what their
        selector makes of the scores, as a `Prediction` of the non-zero neurons of held-out tokens,
        dense. `prediction`: that of all of them together, if there are any.

    Raises:
        ValueError: the model is dense, or an MoE expert saw too few tokens.
    """
    ffns = check_routed(model, "fit")
    cache = ActivationCache(work / "activations")
    cache.fill(model, ffns, blocks_BT, _target_TR)
    measured = {}
    for index, ffn in enumerate(tqdm(ffns, desc="fit routers", disable=None, leave=None)):
        finished = work / f"{index}.safetensors"
        report = work / f"{index}.json"
        if not report.is_file():
            found = _fit_one(ffn, cache, index, step, seed)
            with new_file(finished) as partial:
                save_file(ffn.router.state_dict(), partial)
            with new_file(report) as partial:  # last: with a report, the router is whole, too
                partial.write_text(json.dumps(found))
        ffn.router.load_state_dict(load_file(finished))
        measured[ffn.name] = json.loads(report.read_text())
    return overall(measured)


def overall(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `fit` returns, from what it measured of every FFN."""
    counts = [
        Prediction(**{name: one["prediction"][name] for name in asdict(Prediction())})
        for one in measured.values()
        if "prediction" in one
    ]
    prediction = {"prediction": merge_predictions(counts).figures()} if counts else {}
    return {"routers": measured, **prediction}


def _target_TR(ffn: ExpertFFN, h_TF: Tensor) -> Tensor | None:
    if not isinstance(ffn.router, LearnedRouter):
        return None
    return ffn.router.target_TR(h_TF, ffn.importance()).to(ffn.router.target_dtype)


def _fit_one(
    ffn: ExpertFFN, cache: ActivationCache, index: int, step: Fit, seed: int
) -> dict[str, Any]:
    x_TD = cache.read(index, "x", ffn.projections.size[1])
    held = max(1, round(HELD_OUT * len(x_TD)))
    if len(x_TD) < 2 * held:
        raise ValueError(f"{ffn.name} saw {len(x_TD)} calibration tokens: give more")
    loss = None
    if isinstance(ffn.router, LearnedRouter) and step.epochs:
        target_dtype = ffn.router.target_dtype
        target_TR = cache.read(index, "target", ffn.importance().routed, target_dtype)
        loss = _train(ffn.router, _Text(x_TD, target_TR, held), step, seed)
    return {"loss": loss, **_measured(ffn, x_TD[-held:])}


@torch.no_grad()
def _measured(ffn: ExpertFFN, x_TD: Tensor) -> dict[str, Any]:
    """What the router is worth on these tokens, dense."""
    weights, importance = ffn.weights(), ffn.importance()
    x_TD = x_TD.to(weights.up_FD)
    scores_TR, h_TF = ffn.router(x_TD), ffn.hidden(x_TD)
    dense_flops = 2 * sum(matrix.numel() for matrix in weights.matrices())
    found: dict[str, Any] = {
        **judge(scores_TR.cpu(), importance.norm_TR(h_TF).cpu()),
        "router_share": ffn.router.flops() / dense_flops,
    }
    if ffn.division.of_neurons:
        prediction = Prediction()
        prediction.add(ffn.selector(scores_TR), importance.nonzero_TR(h_TF, ffn.router.zero_below))
        found["prediction"] = prediction.figures()
    return found


class _Text(NamedTuple):
    """Inputs and targets of one FFN; the last `held` tokens only measure."""

    x_TD: Tensor
    target_TR: Tensor
    held: int

    @torch.no_grad()
    def held_loss(self, router: LearnedRouter, batch_size: int) -> float:
        """Mean loss on the tokens that only measure, a batch at a time."""
        held = torch.arange(len(self.x_TD) - self.held, len(self.x_TD))
        parts = held.split(batch_size)
        return sum(len(part) * self.loss(router, part).item() for part in parts) / self.held

    def loss(self, router: LearnedRouter, tokens: Tensor) -> Tensor:
        """Loss on some of the tokens."""
        device = next(router.parameters()).device
        target_TR = self.target_TR[tokens].to(device).float()
        return router.loss(self.x_TD[tokens].to(device), target_TR)


def _train(router: LearnedRouter, text: _Text, step: Fit, seed: int) -> float:
    """Adam on shuffled tokens; keeps the epoch of the least held-out loss and returns that."""
    tokens = len(text.x_TD) - text.held
    router.prepare(text.target_TR[:tokens])
    steps = step.epochs * -(-tokens // step.batch_size)
    optimizer = torch.optim.Adam(router.parameters(), lr=step.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: warmup_cosine(at, steps, WARMUP)
    )
    generator = torch.Generator().manual_seed(seed)
    best, kept = math.inf, router.state_dict()
    for _ in range(step.epochs):
        for chosen in torch.randperm(tokens, generator=generator).split(step.batch_size):
            loss = text.loss(router, chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        held = text.held_loss(router, step.batch_size)
        if held < best:
            best, kept = held, copy.deepcopy(router.state_dict())
    if best == math.inf:
        raise FloatingPointError("a router's loss is not finite: lower the learning rate of `fit`")
    router.load_state_dict(kept)
    return best


def judge(scores_TR: Tensor, target_TR: Tensor) -> dict[str, float]:
    """How well scores choose, when each token runs the same share of its experts.

    The targets are the norms of the experts' outputs, whatever the router learned, so that routers
    of any kind compare.

    Returns:
        For each share in `DENSITIES`: recall, the share of the truly best experts that are among
        the chosen; captured, the chosen experts' share of all target mass; and best, what the
        targets themselves would capture.
    """
    found = {}
    for density in DENSITIES:
        k = max(1, round(density * scores_TR.shape[-1]))
        chosen, true = scores_TR.topk(k).indices, target_TR.topk(k).indices
        hits = torch.zeros_like(target_TR).scatter(-1, true, 1.0).gather(-1, chosen)
        total = target_TR.sum().clamp_min(torch.finfo(target_TR.dtype).tiny)
        found[f"recall_{density}"] = hits.mean().item()
        found[f"captured_{density}"] = (target_TR.gather(-1, chosen).sum() / total).item()
        found[f"best_{density}"] = (target_TR.gather(-1, true).sum() / total).item()
    return found
