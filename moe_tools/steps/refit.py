"""Refit: down projections in closed form for the masks in force.

Every FFN alone, on the donor's own activations: what the masks leave of h has to give the output
that all of h gives. It is ridge regression that shrinks towards the model as it is, not towards 0.

Letters: T tokens, D model width, F neurons, R experts that are routed, K features: the neurons,
then the constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from moe_tools.data import Blocks
from moe_tools.experts.conversion import conversion_so_far, read_conversion, write_conversion
from moe_tools.experts.experts import ExpertFFN, Mode
from moe_tools.experts.selectors import Selector
from moe_tools.kernels.few_bits import StoredBits, store_rows
from moe_tools.steps.calibrate import check_routed, visit_activations
from moe_tools.steps.rules import at_least, require
from moe_tools.steps.step import Step, Work

SUM_BYTES = 4 * 2**30
"""Products of features that are summed at once; more of them take another pass over the text."""


@dataclass(frozen=True)
class Refit(Step):
    """Down projections that make up for what the routers turn off, in closed form.

    Each FFN's is solved alone: what the masks leave of its neurons is to give what all of them give
    when every expert of the model is on. Put it after `attach` and `budget`: it is for the masks of
    that moment, and with every expert on the model is no longer the donor. A router that scores
    with the down projection itself (`oracle`) goes on with the new one, which moves its masks.
    What `quantize` stored in few bits is solved for, then rounded to as many again.

    ```yaml
    - attach: {router: oracle, selector: {kind: threshold}}
    - budget: {target_sparsity: 0.85}
    - refit: {ridge: 0.1}
    ```
    """

    verb = "refit"
    changes_function = True

    ridge: float = 0.1
    """How firmly each weight is held where it is, in mean squares of what the masks leave of a
    neuron."""
    constants: bool = True
    """Adds a bias and, where experts are more than one neuron, a constant for each that is off,
    found in the same solution: they contain what `when_off: mean` adds."""
    tokens: int = 16384
    """Calibration tokens."""

    def check(self) -> None:
        """At least one token, and a ridge above 0."""
        at_least(1, self, "tokens")
        require(self.ridge > 0, self, "ridge", self.ridge, "above 0")

    def rehearse(self, model: PreTrainedModel, donor: str) -> None:
        """Needs routers and plain weights; adds constants of 0."""
        _finish(model, self, _refittable(model))

    def apply(self, model: PreTrainedModel, work: Work) -> dict[str, Any]:
        """Solves; returns what `refit` measured."""
        write_conversion(model, conversion_so_far(model, work.donor))
        return refit(model, self, self.text(work))

    def merge(self, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Joins the FFNs of all layers, and takes the mean of all of them."""
        return overall(super().merge(measured)["errors"])


@torch.no_grad()
def refit(model: nn.Module, step: Refit, blocks_BT: Blocks) -> dict[str, Any]:
    """Solves the down projections of a converted model in place, and says so in its config.

    With z what a token's mask leaves of h, y the dense output without the bias, G = sum z z^T,
    C = sum y z^T and d the mean of G's diagonal, W = (C + ridge d W0) (G + ridge d I)^-1. Constants
    are further entries of z that are held at 0. All masks are decided with the weights as they
    are, before the first is written.

    Returns:
        `errors`: for every FFN ||y - y_dense||^2 / ||y_dense||^2 on the text, its inputs dense,
        `before` and `after`; `mean`: the same over the FFNs.

    Raises:
        ValueError: the model is dense, quantised, in mode weighted or has constants already, an MoE
            expert saw no token, or numbers that are not finite or cannot be solved with so small a
            ridge.
    """
    ffns = _refittable(model)
    masks = [(ffn.selector, ffn.mode) for ffn in ffns]  # the visit runs with every expert on
    found: list[_Found] = []
    with tqdm(total=len(ffns), desc="refit", disable=None, leave=None) as bar:
        while len(found) < len(ffns):
            for sums in _sums(model, step, ffns, masks, len(found), blocks_BT):
                found.append(sums.solve(step.ridge))
                bar.update()
    _finish(model, step, ffns)
    for ffn, one in zip(ffns, found, strict=True):
        one.write(ffn)
    return overall({ffn.name: one.errors for ffn, one in zip(ffns, found, strict=True)})


def overall(errors: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What `refit` returns, from the errors of every FFN."""
    mean = {
        when: sum(each[when] for each in errors.values()) / len(errors)
        for when in ("before", "after")
    }
    return {"errors": errors, "mean": mean}


def _refittable(model: nn.Module) -> list[ExpertFFN]:
    """The routed FFNs, if their down projections can be solved.

    Raises:
        ValueError: as `refit`.
    """
    ffns = check_routed(model, Refit.verb)
    block = read_conversion(model)
    if block is not None and block.constants:
        raise ValueError(
            "refit: the model has been refitted, and its down projections no longer give the dense "
            "output: refit once, on the folder from before"
        )
    if block is not None and block.thresholds is not None:
        raise ValueError(
            "refit: it solves for the masks of routers, and the model has thresholds as well: put "
            "`refit` before `threshold`"
        )
    for ffn in ffns:
        if ffn.mode == "weighted":
            raise ValueError(
                f"refit: {ffn.name} is in mode weighted, and refit solves for experts that are on "
                "or off: use mode hard"
            )
        ffn.found.views()  # refuses what is quantised
    return ffns


def _finish(model: nn.Module, step: Refit, ffns: Sequence[ExpertFFN]) -> None:
    """Makes room for the constants, if any, and notes them in the config."""
    conversion = read_conversion(model)
    assert conversion is not None
    if step.constants:
        for ffn in ffns:
            ffn.add_constants()
    write_conversion(model, replace(conversion, constants=step.constants))


def _sums(
    model: nn.Module,
    step: Refit,
    ffns: Sequence[ExpertFFN],
    masks: Sequence[tuple[Selector, Mode]],
    first: int,
    blocks_BT: Blocks,
) -> list[_Sums]:
    """What the text shows of the next FFNs: of all of them, unless their products are too large."""
    bytes_each = 8 * max(
        _features(ffn, step) * (_features(ffn, step) + ffn.found.width) for ffn in ffns
    )
    fit = max(1, SUM_BYTES // bytes_each)
    block = read_conversion(model)
    bits = None if block is None else block.weight_bits
    sums = [_Sums(ffn, step, bits) for ffn in ffns[first : first + fit]]

    def visit(index: int, x_TD: Tensor, h_TF: Tensor) -> None:
        if 0 <= index - first < len(sums):
            with _routed(ffns[index], *masks[index]):
                sums[index - first].add(x_TD, h_TF)

    visit_activations(model, blocks_BT, visit, title="calibrate refit")
    return sums


def _features(ffn: ExpertFFN, step: Refit) -> int:
    """K."""
    if not step.constants:
        return ffn.division.neurons
    off = 0 if ffn.division.of_neurons else ffn.division.num_experts - ffn.shared
    return ffn.division.neurons + 1 + off


@contextmanager
def _routed(ffn: ExpertFFN, selector: Selector, mode: Mode) -> Iterator[None]:
    """While it lasts, an FFN decides and switches so."""
    kept = ffn.selector, ffn.mode
    ffn.selector, ffn.mode = selector, mode
    try:
        yield
    finally:
        ffn.selector, ffn.mode = kept


class _Found(NamedTuple):
    """The solution of one FFN, in its dtype."""

    down_FD: Tensor
    bias_D: Tensor | None
    off_RD: Tensor | None
    errors: dict[str, float]

    def write(self, ffn: ExpertFFN) -> None:
        ffn.found.views().down_FD.copy_(self.down_FD)
        for mine, solved in ((ffn.bias_D, self.bias_D), (ffn.off_RD, self.off_RD)):
            if mine is not None and solved is not None:
                mine.copy_(solved)


class _Sums:
    """Sums over the tokens of one FFN: what its features say of each other, and of what is lost.

    It is the change of W that is solved for, from what the FFN loses now: where nothing is lost it
    is 0 to the last bit, and the ridge pulls towards no change.
    """

    def __init__(self, ffn: ExpertFFN, step: Refit, bits: int | None) -> None:
        features, down_FD = _features(ffn, step), ffn.weights().down_FD
        self.ffn = ffn
        self.constants = step.constants
        self.bits = bits
        """Of the grid on which the weights lie; None: on none."""
        self.gram_KK = down_FD.new_zeros(features, features, dtype=torch.float64)
        self.lost_KD = down_FD.new_zeros(features, down_FD.shape[1], dtype=torch.float64)
        self.lost = self.dense = 0.0
        """Squares of what is lost of the outputs, and of the dense outputs."""

    def add(self, x_TD: Tensor, h_TF: Tensor) -> None:
        """A batch; the FFN decides as it does in the converted model."""
        routing = self.ffn.route(x_TD)
        z_TF = self.ffn.switch(h_TF, routing)
        dtype = torch.promote_types(h_TF.dtype, torch.float32)
        z_TF, h_TF, down_FD = (t.to(dtype) for t in (z_TF, h_TF, self.ffn.weights().down_FD))
        features = [z_TF]
        if self.constants:
            features.append(z_TF.new_ones(len(z_TF), 1))
            if not self.ffn.division.of_neurons:
                features.append(self.ffn.off_TR(routing).to(dtype))
        features_TK = torch.cat(features, dim=1)
        lost_TD = (h_TF - z_TF) @ down_FD
        self.gram_KK += features_TK.T @ features_TK
        self.lost_KD += features_TK.T @ lost_TD
        self.lost += float(lost_TD.double().square().sum())
        self.dense += float((h_TF @ down_FD).double().square().sum())

    def solve(self, ridge: float) -> _Found:
        """The new down projection and constants, and the error without and with them.

        Raises:
            ValueError: as `refit`.
        """
        down_FD = self.ffn.weights().down_FD
        change_KD = self._change_KD(ridge * (float(self._squares_F().mean()) or 1.0))
        neurons = self.ffn.division.neurons
        new_FD = down_FD.double() + change_KD[:neurons]
        if self.bits is not None:
            new_FD = store_rows(new_FD, cast(StoredBits, self.bits)).values_FD()
        new_FD = new_FD.to(down_FD.dtype)
        new_CD = change_KD[neurons:].to(down_FD.dtype)
        change_KD = torch.cat([new_FD.double() - down_FD.double(), new_CD.double()])  # as rounded
        after = self.lost + float((change_KD * (self.gram_KK @ change_KD - 2 * self.lost_KD)).sum())
        dense = self.dense or 1.0
        errors = {"before": self.lost / dense, "after": max(after, 0.0) / dense}
        bias_D, off_RD = (new_CD[0], new_CD[1:]) if self.constants else (None, None)
        return _Found(new_FD, bias_D, off_RD, errors)

    def _squares_F(self) -> Tensor:
        return self.gram_KK.diagonal()[: self.ffn.division.neurons]

    def _change_KD(self, held: float) -> Tensor:
        gram_KK = self.gram_KK.clone()
        gram_KK.diagonal().add_(held)
        factor_KK, failed = torch.linalg.cholesky_ex(gram_KK)
        change_KD = torch.cholesky_solve(self.lost_KD, factor_KK)
        if failed or not change_KD.isfinite().all():
            raise ValueError(
                f"{self.ffn.name}: refit finds no solution: its activations are not finite, or the "
                "ridge is too small for them"
            )
        return change_KD
