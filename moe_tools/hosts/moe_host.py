"""MoE hosts, like Mixtral: their fused experts taken apart, so that each is an ordinary FFN.

transformers 5 keeps all experts of a layer in two 3-D parameters. `unfuse_experts` replaces that
module by `HostExperts`, whose children are views of the same storage; `fuse_into` is its inverse.
`fill_experts` makes all experts of a layer one and the same FFN.

Letters: T tokens, D model width, F neurons of one expert, X experts of the host, K experts that
the host chooses for a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_tools.hosts.layouts import Layout
from moe_tools.hosts.moe_kernels import (
    IMPLEMENTATION,
    as_one,
    lay_out,
    one_activation,
    run_experts,
)
from moe_tools.kernels.weights import FFNWeights

HOST_EXPERT = Layout("gate_up_proj", "down_proj", "activation_fn", gate="gate_up_proj")
FUSED_EXPERTS = ("MixtralExperts", "Qwen2MoeExperts", "Qwen3MoeExperts", "OlmoeExperts")
"""Host classes with gate_up_proj (X, 2F, D), down_proj (X, D, F) and act_fn."""
DENSE = ("HostExpert", "SwappedFFN")
"""Classes of an expert that is one FFN as it stands: no router inside, nothing packed."""


class HostExpert(nn.Module):
    """One expert of the host: a gated FFN with a fused gate and up projection."""

    def __init__(self, gate_up_proj: nn.Linear, down_proj: nn.Linear, act: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.activation_fn = act
        self.down_proj = down_proj

    def forward(self, x_TD: Tensor) -> Tensor:
        """Returns y_TD of this expert."""
        gate_TF, up_TF = self.gate_up_proj(x_TD).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate_TF) * up_TF)


class HostExperts(nn.ModuleList):
    """The experts of one layer; the host's own router still chooses among them."""

    def __init__(self, experts: Iterable[nn.Module], config: Any) -> None:
        super().__init__(experts)
        self.config = config
        """The host's, which names the implementation of its experts."""

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Returns the sum of the chosen experts' outputs, weighted by the host's router.

        With `experts_implementation="moe_tools"` all together, where all are dense, of one
        activation, and nothing watches or adapts a part of them; otherwise one by one.
        """
        asked = self.config._experts_implementation == IMPLEMENTATION
        act = one_activation(self._parts("activation_fn")) if asked and self._plain() else None
        if act is not None:
            gate_up_XFD = as_one(self._weights("gate_up_proj"))
            down_XDF = as_one(self._weights("down_proj"))
            return run_experts(gate_up_XFD, down_XDF, act, x_TD, chosen_TK, weight_TK)
        return self._one_by_one(x_TD, chosen_TK, weight_TK)

    def _plain(self) -> bool:
        dense = all(type(expert).__name__ in DENSE for expert in self)
        parts = [module for expert in self for module in expert.modules()]
        watched = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        linears = [*self._parts("gate_up_proj"), *self._parts("down_proj")] if dense else []
        return dense and not watched and all(type(linear) is nn.Linear for linear in linears)

    def _parts(self, name: str) -> list[nn.Module]:
        return [expert.get_submodule(name) for expert in self]

    def _weights(self, name: str) -> list[Tensor]:
        return [linear.get_parameter("weight") for linear in self._parts(name)]

    def _one_by_one(self, x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Runs each expert on its tokens; with gradients also on none.

        An expert without a token so gets gradients of zero, as the host's fused experts do.
        DistributedDataParallel waits for every gradient, and ZeRO gathers in every process the
        weights of the modules that run, in the order in which they run.
        """
        y_TD = torch.zeros_like(x_TD)
        for expert, rows in zip(self, self._rows_of_experts(chosen_TK), strict=True):
            if len(rows) or torch.is_grad_enabled():
                place, token = rows // len(chosen_TK), rows % len(chosen_TK)
                out_TD = expert(x_TD[token]) * weight_TK[token, place, None]
                y_TD = y_TD.index_add(0, token, out_TD.to(y_TD.dtype))
        return y_TD

    def _rows_of_experts(self, chosen_TK: Tensor) -> Sequence[Tensor]:
        """Returns where each expert stands in `chosen_TK.T`, in the order of the host's own loop.

        The host waits for the device once, for the counts: asking each expert for its tokens would
        be one wait an expert.
        """
        ranked = chosen_TK.T.flatten().sort(stable=True)
        borders = torch.arange(1, len(self), device=chosen_TK.device)
        ends = torch.searchsorted(ranked.values, borders)
        return ranked.indices.tensor_split(ends.cpu())

    def fuse_into(self, state: dict[str, Tensor], path: str) -> None:
        """Replaces the per-expert tensors of `state` by the host's fused ones."""
        for name in ("gate_up_proj", "down_proj"):
            rows = [state.pop(f"{path}.{index}.{name}.weight") for index in range(len(self))]
            state[f"{path}.{name}"] = torch.stack(rows)

    @torch.no_grad()
    def lay_out(self) -> None:
        """Moves each matrix of all experts into one tensor, laid out as the kernels read it."""
        gate_up_XFD = torch.stack(self._weights("gate_up_proj"))
        down_XDF = lay_out(torch.stack(self._weights("down_proj")))
        for name, fused in (("gate_up_proj", gate_up_XFD), ("down_proj", down_XDF)):
            for weight, part in zip(self._weights(name), fused, strict=True):
                weight.data = part

    def split_from(self, state: dict[str, Tensor], path: str) -> None:
        """Replaces the host's fused tensors of `state` by those of each expert."""
        for name in ("gate_up_proj", "down_proj"):
            rows = state.pop(f"{path}.{name}", None)
            if rows is not None:
                state |= {f"{path}.{index}.{name}.weight": row for index, row in enumerate(rows)}


def unfuse_experts(model: nn.Module) -> None:
    """Takes every fused experts module of `model` apart in place; no weight is copied.

    From here on our module runs. Of the implementations that transformers knows it has two:
    `experts_implementation="moe_tools"`, and expert by expert.

    Raises:
        ValueError: fused experts of an unknown class, or spread over devices: both would go on
            computing what they did, whatever is done to the other FFNs.
    """
    fused = fused_experts(model)
    for path, module in fused.items():  # first all checks, then the first change
        check_fused(path, module)
    for path, module in fused.items():
        opened = HostExperts(expert_views(module), module.config)
        model.set_submodule(path, opened.train(module.training))


def chosen_share(model: nn.Module, name: str) -> float:
    """Returns the share of the tokens that the FFN of a name sees: K / X of an MoE host's expert.

    The host's router is taken to spread them evenly.
    """
    host = model.get_submodule(name.rpartition(".")[0])
    if isinstance(host, HostExperts):
        experts = len(host)
    elif _is_fused(host):
        experts = len(host.get_parameter("gate_up_proj"))
    else:
        return 1.0
    config: Any = model.config
    return float(config.num_experts_per_tok / experts)


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the fused experts of every layer that has them, by path, in the host's order."""
    return {path: module for path, module in model.named_modules() if _is_fused(module)}


@torch.no_grad()
def fill_experts(fused: nn.Module, weights: FFNWeights) -> None:
    """Makes every expert of a fused module a copy of one gated FFN without biases."""
    assert weights.gate_FD is not None
    gate_up_FD = torch.cat([weights.gate_FD, weights.up_FD])
    fused.get_parameter("gate_up_proj").copy_(gate_up_FD)  # one for all X
    fused.get_parameter("down_proj").copy_(weights.down_FD.T)


def _is_fused(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "gate_up_proj" in own and own["gate_up_proj"].ndim == 3


def check_fused(path: str, fused: nn.Module) -> None:
    """Checks that we know what a fused module computes.

    Raises:
        ValueError: it is of an unknown class, or its experts are spread over devices.
    """
    name = type(fused).__name__
    if name not in FUSED_EXPERTS:
        raise ValueError(
            f"{path}: moe-tools does not know experts of class {name}; known: "
            f"{', '.join(FUSED_EXPERTS)}"
        )
    if fused._is_expert_parallel:
        raise ValueError(
            f"{path}: its experts are spread over devices: load the model without expert "
            "parallelism"
        )


def expert_views(fused: nn.Module) -> list[HostExpert]:
    """Every expert of a fused module as a module of its own, around views of the fused weights."""
    gate_up_XFD = fused.get_parameter("gate_up_proj")
    down_XDF = fused.get_parameter("down_proj")
    act = fused.get_submodule("act_fn")
    return [
        HostExpert(_linear(gate_up), _linear(down), act)
        for gate_up, down in zip(gate_up_XFD, down_XDF, strict=True)
    ]


def _linear(weight: Tensor) -> nn.Linear:
    """Makes a linear around an existing weight."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return linear
