"""The converted FFN: the host's own linears, a router, a selector.

Letters: T tokens, D model width, F neurons, E experts, R experts that are routed. Every method
takes any leading dimensions where T stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moe_tools.experts.division import Division
from moe_tools.experts.hooks import all_are_heard
from moe_tools.experts.importance import Importance
from moe_tools.experts.packed_ffn import PackableFFN
from moe_tools.experts.routers import Router, RowReader
from moe_tools.experts.selectors import Everything, Selector, Threshold, TopK
from moe_tools.experts.training_kernels import TrainingKernels, computed_TD
from moe_tools.experts.weighted import weights_TR
from moe_tools.hosts.ffn import FFN
from moe_tools.hosts.input_threshold import nothing_dropped
from moe_tools.hosts.linears import device_of, dtype_of
from moe_tools.kernels.cpu.rows import FLOATS
from moe_tools.kernels.packed import PackedFFN
from moe_tools.kernels.scores import Scores

Mode = Literal["soft", "straight", "weighted", "hard"]
"""How scores G switch experts.

soft: y = sum G_e E_e(x), LTE stage 1. hard: y = sum of the selected experts, LTE stage 2; the
router gets no gradient. straight: hard in the forward pass, soft in the backward pass (the
straight-through estimator, arXiv 1308.3432): routers learn without a gap to close afterwards.
weighted: y = sum of the K selected experts, each times K G_e / sum of their G, so that equal
scores are mode hard; shared experts weigh 1. That is LLaMA-MoE (arXiv 2406.16554), Mixtral and
GLM4-MoE: routers learn through the weights, and stay what weighs afterwards.
"""

LEARNING: tuple[Mode, ...] = ("soft", "straight", "weighted")
"""Modes in which gradients reach the routers."""


class Routing(NamedTuple):
    """One decision of one FFN on one batch. Leading dimensions are the FFN input's.

    Scores and masks have every row, padding included, so that they line up with other tensors of
    the model; whatever is counted leaves padding out.
    """

    ffn: str
    scores_TE: Tensor
    """A shared expert, which always runs, scores 1."""
    mask_TE: Tensor
    division: Division
    """Sizes of the experts."""
    shared: int = 0
    """Experts that always run: the first ones."""
    selector: Selector = Everything()
    """What made the mask of the scores of the others."""
    valid_T: Tensor | None = None
    """Which rows are tokens, by the attention mask of the pass; None: all of them."""

    @property
    def scores_TR(self) -> Tensor:
        """Scores of the experts that are routed: all but the shared ones."""
        return self.scores_TE[..., self.shared :]

    @property
    def threshold_T1(self) -> Tensor:
        """The score that decides for each token, see `Selector.threshold_T1`."""
        return self.selector.threshold_T1(self.scores_TR)

    @property
    def tokens(self) -> int:
        """How many tokens the FFN saw, without padding."""
        return len(self.of_tokens(self.mask_TE))

    @property
    def neurons_on(self) -> int:
        """Neurons that ran, summed over the tokens."""
        return self.division.count(self.of_tokens(self.mask_TE))

    def of_tokens(self, values_T: Tensor) -> Tensor:
        """Rows of `values_T` without padding, as one dimension.

        Args:
            values_T: has the leading dimensions of the mask.
        """
        if self.valid_T is not None:
            return values_T[self.valid_T]
        return values_T.reshape(-1, *values_T.shape[self.mask_TE.ndim - 1 :])

    def without_padding(self) -> Routing:
        """The same decision on the tokens alone."""
        if self.valid_T is None:
            return self
        scores_TE, mask_TE = (self.of_tokens(each) for each in (self.scores_TE, self.mask_TE))
        return self._replace(scores_TE=scores_TE, mask_TE=mask_TE, valid_T=None)


class ExpertFFN(PackableFFN):
    """An FFN whose neurons run only when their expert is selected.

    With every expert on, in hard mode, the output equals exactly that of the dense FFN with these
    weights, but for `bias_D`.
    """

    done = "routed"

    def __init__(
        self,
        ffn: FFN,
        division: Division,
        router: Router,
        selector: Selector,
        mode: Mode,
        shared: int = 0,
    ) -> None:
        super().__init__(ffn)
        self.division = division
        self.shared = shared
        """Experts that always run: the first ones."""
        self.router = router
        if isinstance(router, RowReader):
            router.ffn = self.found
        self.selector = selector
        self.mode: Mode = mode
        self.off_F: Tensor | None
        """What a neuron of an expert that is off contributes to h; None means zero."""
        self.register_buffer("off_F", None)
        self.bias_D: Tensor | None
        """Added to y for every token; None: nothing."""
        self.register_buffer("bias_D", None)
        self.off_RD: Tensor | None
        """What each routed expert that is off adds to y; None: nothing."""
        self.register_buffer("off_RD", None)
        self.observers: list[Callable[[Routing], None]] = []
        """Each is shown every decision."""
        self.kernels = TrainingKernels(self.name)
        self.interventions: list[Callable[[Tensor], Tensor]] = []
        """Each is given mask_TE and returns another, see `intervene`."""

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
        """y_TD, plus the residual where an optimised layer gives it.

        Where only the host computes h (`Layout.masked`), it is h_TF that comes in.

        Raises:
            ValueError: an optimised FFN in training, or in mode soft or weighted.
        """
        if self.packed is not None and not self.layout.masked:
            self._check_packed()
            if self.bias_D is None or residual_TD is None:
                return self._packed_TD(self.packed, x_TD, residual_TD)
            return residual_TD + self._packed_TD(self.packed, x_TD, None)
        y_TD = self._plain_TD(x_TD)
        return y_TD if residual_TD is None else residual_TD + y_TD

    def _plain_TD(self, x_TD: Tensor) -> Tensor:
        """y_TD from the host's own modules: all of h, then a mask, unless training skips it."""
        if self.layout.masked:
            routing = self.route(self.entered())
            return self.complete_TD(self.down(self.switch(x_TD, routing)), routing)
        routing, projections = self.route(x_TD), self.projections
        mask_TE, hard = routing.mask_TE, self.training and self.mode == "hard"
        if hard and self.kernels.pay(projections, x_TD, mask_TE):
            weights = replace(projections.weights(), off_F=self.off_F)
            return self.complete_TD(computed_TD(weights, x_TD, mask_TE), routing)
        y_TD = projections.project_TD(self.switch(projections.hidden_TF(x_TD), routing))
        return self.complete_TD(y_TD, routing)

    def _packed_TD(self, packed: PackedFFN, x_TD: Tensor, residual_TD: Tensor | None) -> Tensor:
        """y_TD from packed weights, which find what runs by themselves where they can."""
        scores = self._scores(packed, x_TD)
        if scores is not None and packed.takes(x_TD, scores):
            y_TD = packed.scored(x_TD, scores, residual_TD)
        elif (mask_TE := self._mask_TE(x_TD)) is not None:
            y_TD = packed(x_TD, mask_TE, residual_TD)
        else:
            routing = self.route(x_TD)
            return self.complete_TD(packed(x_TD, routing.mask_TE, residual_TD), routing)
        return y_TD if self.bias_D is None else y_TD + self.bias_D.to(y_TD.dtype)

    def _check_packed(self) -> None:
        if self.training or self.mode in ("soft", "weighted"):
            state = "in training" if self.training else f"in mode {self.mode}"
            raise ValueError(f"{self.name} is optimised and cannot run {state}: load it again")

    def _scores(self, packed: PackedFFN, x_TD: Tensor) -> Scores | None:
        """What packed weights need to select by themselves, where nobody looks; else None."""
        tau = self._unseen_tau(x_TD) if packed.selects else None
        return None if tau is None else self.router.scores(x_TD, tau, self.shared)

    def _mask_TE(self, x_TD: Tensor) -> Tensor | None:
        """The mask where nobody looks at the scores, and the router can do without; else None."""
        tau = None if torch.compiler.is_compiling() or self.shared else self._unseen_tau(x_TD)
        return None if tau is None else self.router.above_TR(x_TD, tau)

    def _unseen_tau(self, x_TD: Tensor) -> float | None:
        """The score above which experts run, where nobody looks at any score; else None."""
        if all_are_heard() or self._seen():
            return None
        if x_TD.dtype not in FLOATS or self.off_RD is not None:
            return None
        return self.selector.tau if type(self.selector) is Threshold else None

    def unseen_selector(self) -> Selector | None:
        """What chooses among all experts, where nobody looks at it or at the scores; else None."""
        return None if self._seen() or self.shared else self.selector

    def _seen(self) -> bool:
        """Whether somebody looks at the scores or the mask, or changes them."""
        router = self.router
        heard = router._forward_hooks or router._forward_pre_hooks or "forward" in router.__dict__
        return bool(self.observers or self.interventions or heard)

    @property
    def share(self) -> float | None:
        """Of its neurons that one token wants, where that is the same for all; else None."""
        selector, routed = self.selector, self.division.num_experts - self.shared
        if not isinstance(selector, TopK):
            return None
        return (selector.count(routed) + self.shared) / self.division.num_experts

    def route(self, x_TD: Tensor) -> Routing:
        """Scores and mask, as interventions leave it, shown to the observers."""
        scores_TR = self.router(x_TD)
        mask_TR = self.selector(scores_TR)
        if self.shared:
            scores_TR = nn.functional.pad(scores_TR, (self.shared, 0), value=1.0)
            mask_TR = nn.functional.pad(mask_TR, (self.shared, 0), value=True)
        for change in self.interventions:
            mask_TR = change(mask_TR)
        routing = Routing(self.name, scores_TR, mask_TR, self.division, self.shared, self.selector)
        for observe in self.observers:
            observe(routing)
        return routing

    def switch(self, h_TF: Tensor, routing: Routing) -> Tensor:
        """h_TF with the neurons of unselected experts off, or weighed by score, or both."""
        if self.mode == "hard":  # chosen, not multiplied: an infinite h that is off stays off
            off_TF = self.division.spread_TF(~routing.mask_TE)
            if self.off_F is None:
                return h_TF.masked_fill(off_TF, 0.0)
            return torch.where(off_TF, self.off_F.to(h_TF.dtype), h_TF)
        if self.mode == "weighted":  # as above
            h_TF = h_TF.masked_fill(self.division.spread_TF(~routing.mask_TE), 0.0)
        weight_TF = self.division.spread_TF(self._weight_TE(routing).to(h_TF.dtype))
        if self.off_F is None:
            return h_TF * weight_TF
        return self.off_F.to(h_TF.dtype).lerp(h_TF, weight_TF)

    def complete_TD(self, y_TD: Tensor, routing: Routing) -> Tensor:
        """y_TD of the neurons with the constants that `refit` found, if any."""
        if self.bias_D is None:
            return y_TD
        constant_TD = self.bias_D
        if self.off_RD is not None:
            constant_TD = constant_TD + self.off_TR(routing).to(self.off_RD.dtype) @ self.off_RD
        return y_TD + constant_TD.to(y_TD.dtype)

    def off_TR(self, routing: Routing) -> Tensor:
        """How far each routed expert is off: 1 or 0, or in mode soft 1 - its score."""
        return 1 - self._weight_TE(routing)[..., self.shared :]

    def add_constants(self) -> None:
        """Makes room for `bias_D`, and for `off_RD` where an expert is more than one neuron.

        For single neurons it would be as large as the down projection. All are 0, which changes no
        output.
        """
        up, width = self.projections.up, self.projections.size[1]
        like = torch.zeros(width, dtype=dtype_of(up) or torch.float32, device=device_of(up))
        self.bias_D = like
        if not self.division.of_neurons:
            self.off_RD = like.new_zeros(self.division.num_experts - self.shared, width)

    def _weight_TE(self, routing: Routing) -> Tensor:
        scores_TE, mask_TE = routing.scores_TE, routing.mask_TE.to(routing.scores_TE.dtype)
        shared = self.shared
        match self.mode:
            case "soft":
                return scores_TE
            case "straight":
                return scores_TE + (mask_TE - scores_TE).detach()
            case "weighted":
                routed_TR = weights_TR(scores_TE[..., shared:], routing.mask_TE[..., shared:])
                return torch.cat([mask_TE[..., :shared], routed_TR.to(mask_TE.dtype)], dim=-1)
            case "hard":
                return mask_TE

    def check_mode(self, mode: Mode) -> None:
        """Whether its experts can be switched so.

        Raises:
            ValueError: mode weighted, of scores that have no shares, or beside constants that are
                added for experts that are off: no method says what a weight does to them.
        """
        if mode != "weighted":
            return
        if not self.router.ratio_scale:
            raise ValueError(
                f"{self.name}: {type(self.router).__name__} scores below 0, which mode weighted "
                "cannot multiply by: use another router, or mode hard"
            )
        if self.off_F is not None or self.bias_D is not None:
            added = "when_off: mean" if self.bias_D is None else "the constants of refit"
            raise ValueError(
                f"{self.name}: mode weighted goes without {added}: use when_off: zero and no "
                "`refit`, or mode hard"
            )

    def importance(self) -> Importance:
        """Its experts, and what their neurons are worth."""
        return Importance(self.division, self.shared, self.weights().down_FD, self.off_F)


@contextmanager
def every_expert_on(model: nn.Module) -> Iterator[None]:
    """While it lasts, a converted model computes what its dense one would, and drops no input."""
    ffns = expert_ffns(model)
    kept = [(ffn.selector, ffn.mode) for ffn in ffns]
    for ffn in ffns:
        ffn.selector, ffn.mode = Everything(), "hard"
    try:
        with nothing_dropped(model):
            yield
    finally:
        for ffn, (selector, mode) in zip(ffns, kept, strict=True):
            ffn.selector, ffn.mode = selector, mode


def expert_ffns(model: nn.Module) -> list[ExpertFFN]:
    """The converted FFNs of a model, in the host's order; empty when it is dense."""
    return [module for module in model.modules() if isinstance(module, ExpertFFN)]
