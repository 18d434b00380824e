"""The converted FFN: the host's own linears, a router, a selector.

Letters: T tokens, D model width, F neurons, E experts, N = F / E neurons of one expert. Every
method takes any leading dimensions where T stands.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moe_tools.model.ffn import FFN, Weights, child_name, host_names, read_weights
from moe_tools.model.partition import experts_of_size
from moe_tools.model.routers import Router
from moe_tools.model.routing import RoutedFFN, Routing
from moe_tools.model.selectors import Selector

Mode = Literal["soft", "straight", "hard"]
"""How scores G switch experts.

soft: y = sum G_e E_e(x), LTE stage 1. hard: y = sum of the selected experts, LTE stage 2; the
router gets no gradient. straight: hard in the forward pass, soft in the backward pass (the
straight-through estimator, arXiv 1308.3432): routers learn without a gap to close afterwards.
"""


class ExpertFFN(RoutedFFN):
    """An FFN whose neurons run only when their expert is selected.

    The children keep the host's names, so adapters and quantisers written for the host still
    find them. With every expert on, in hard mode, the output equals the dense FFN's exactly.
    """

    def __init__(
        self, ffn: FFN, expert_size: int, router: Router, selector: Selector, mode: Mode
    ) -> None:
        super().__init__(ffn.name)
        self.layout = ffn.layout
        for path in ffn.layout.parts():
            self.add_module(child_name(ffn.layout, path), ffn.part(path))
        self.num_experts = experts_of_size(len(ffn.weights().up_FD), expert_size, ffn.name)
        self.expert_size = expert_size
        self.router = router
        self.selector = selector
        self.mode: Mode = mode
        self.off_F: Tensor | None
        """What a neuron of an expert that is off contributes to h; None means zero."""
        self.register_buffer("off_F", None)

    def forward(self, x_TD: Tensor) -> Tensor:
        """y_TD."""
        routing = self.route(x_TD)
        return self.project(self.switch(self.hidden(x_TD), routing))

    def route(self, x_TD: Tensor) -> Routing:
        """Scores and mask, shown to the observers."""
        scores_TE = self.router(x_TD)
        routing = Routing(self.name, scores_TE, self.selector(scores_TE))
        for observe in self.observers:
            observe(routing)
        return routing

    def hidden(self, x_TD: Tensor) -> Tensor:
        """h_TF of every neuron, as the host computes it."""
        act = self._part(self.layout.act)
        up = self._part(self.layout.up)
        if self.layout.gate is None:
            return act(up(x_TD))
        if self.layout.fused:
            gate_TF, up_TF = up(x_TD).chunk(2, dim=-1)
        else:
            gate_TF, up_TF = self._part(self.layout.gate)(x_TD), up(x_TD)
        return act(gate_TF) * up_TF

    def switch(self, h_TF: Tensor, routing: Routing) -> Tensor:
        """h_TF with the neurons of unselected experts off (hard), or weighed by score (soft)."""
        h_TEN = h_TF.unflatten(-1, (self.num_experts, -1))
        weight_TE1 = self._weight_TE(routing)[..., None].to(h_TF.dtype)
        if self.off_F is None:
            return (h_TEN * weight_TE1).flatten(-2)
        off_EN = self.off_F.to(h_TF.dtype).view(self.num_experts, -1)
        if self.mode == "hard":  # an infinite h that is off stays off
            return torch.where(routing.mask_TE[..., None], h_TEN, off_EN).flatten(-2)
        return off_EN.lerp(h_TEN, weight_TE1).flatten(-2)

    def _weight_TE(self, routing: Routing) -> Tensor:
        scores_TE, mask_TE = routing.scores_TE, routing.mask_TE.to(routing.scores_TE.dtype)
        if self.mode == "soft":
            return scores_TE
        return mask_TE if self.mode == "hard" else scores_TE + (mask_TE - scores_TE).detach()

    def project(self, h_TF: Tensor) -> Tensor:
        """y_TD from h_TF, with the host's own dropouts."""
        if self.layout.hidden_dropout is not None:
            h_TF = self._part(self.layout.hidden_dropout)(h_TF)
        down = self.down
        if not torch.is_autocast_enabled(h_TF.device.type):
            # T5 keeps this one in fp32 when loaded in fp16
            h_TF = h_TF.to(down.weight.dtype)  # type: ignore[arg-type]
        y_TD: Tensor = down(h_TF)
        if self.layout.output_dropout is not None:
            y_TD = self._part(self.layout.output_dropout)(y_TD)
        return y_TD

    def weights(self) -> Weights:
        """Neuron-major views of the weights."""
        gate = None if self.layout.gate is None else self._part(self.layout.gate)
        return read_weights(gate, self._part(self.layout.up), self.down)

    @property
    def down(self) -> nn.Module:
        """The host's down projection."""
        return self._part(self.layout.down)

    @property
    def renames(self) -> dict[str, str]:
        """Prefixes of our tensors -> the host's, where they differ."""
        return host_names(self.name, self.layout)

    def _part(self, path: str) -> nn.Module:
        return self.get_submodule(child_name(self.layout, path))


def expert_ffns(model: nn.Module) -> list[ExpertFFN]:
    """The converted FFNs of a model, in forward order; empty when it is dense."""
    return [module for module in model.modules() if isinstance(module, ExpertFFN)]
