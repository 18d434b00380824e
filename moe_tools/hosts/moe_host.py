"""MoE hosts, like Mixtral: their fused experts taken apart, so that each is an ordinary FFN.

transformers 5 keeps all experts of a layer in 3-D parameters. `unfuse_experts` replaces that
module by `HostExperts`, whose children are views of the same storage; `fuse_into` is its inverse.
`fill_experts` makes all experts of a layer one and the same FFN.

Letters: T tokens, D model width, F neurons of one expert, X experts of the host, K experts that
the host chooses for a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moe_tools.hosts.expert_proof import prove_experts
from moe_tools.hosts.fused import Storage, check_fused, fused_experts, is_fused
from moe_tools.hosts.host_expert import expert_views
from moe_tools.hosts.linears import is_plain
from moe_tools.hosts.moe_kernels import (
    IMPLEMENTATION,
    as_one,
    lay_out,
    one_activation,
    run_experts,
)
from moe_tools.kernels.weights import FFNWeights

DENSE = ("HostExpert", "SwappedFFN")
"""Classes of an expert that is one FFN as the kernels know it: no router inside, nothing packed."""
CHOSEN_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k",
)
"""Keys of a host's config for the number of experts that it chooses for a token."""


class HostExperts(nn.ModuleList):
    """The experts of one layer; the host's own router still chooses among them.

    Where the host can choose an expert that hands its tokens through as they are (LongCat), these
    follow the others: they have a number and no module.
    """

    runs_idle = False
    """Whether an expert without a token runs without gradients, too: where weights are sharded,
    every process has to run the same modules."""

    def __init__(
        self,
        experts: Iterable[nn.Module],
        config: Any,
        storage: Storage,
        idle_up: Tensor | None = None,
    ) -> None:
        super().__init__(experts)
        self.config = config
        """The host's, which names the implementation of its experts; None: it names none."""
        self.storage = storage
        idle = None if idle_up is None else nn.Parameter(idle_up.detach(), requires_grad=False)
        self.register_parameter("idle_up", idle)
        """Up rows that the host keeps for experts that only hand tokens through: never read."""

    @property
    def choices(self) -> int:
        """How many experts the host's router knows."""
        idle = self._parameters["idle_up"]
        return len(self) + (0 if idle is None else len(idle))

    def forward(self, x_TD: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Returns the sum of the chosen experts' outputs, weighted by the host's router.

        With `experts_implementation="moe_tools"` all together, where all are dense, of one
        activation, and nothing watches or adapts a part of them; otherwise one by one.

        Args:
            x_TD: the tokens; of a host that calls every expert, X T rows (`fused.Calls`).
            routing: chosen_TK and weight_TK, as far as the host gives them.
            named: the same.
        """
        chosen_TK = self.chosen_TK((x_TD, *routing))
        if self.storage.calls == "every":
            return self._every(x_TD, chosen_TK)
        if self.storage.calls == "weighed":
            (gamma_TX,) = (*routing, *named.values())
            flat_TD, weight_TK = x_TD.flatten(0, -2), gamma_TX.reshape(chosen_TK.shape)
            return self._one_by_one(flat_TD, chosen_TK, weight_TK).view_as(x_TD)
        _, weight_TK = routing
        asked = self.config is not None and self.config._experts_implementation == IMPLEMENTATION
        act = one_activation(self._parts("activation_fn")) if asked and self._plain() else None
        if act is not None:
            gate_up_XFD, down_XDF = self._all_as_one()
            return run_experts(gate_up_XFD, down_XDF, act, x_TD, chosen_TK, weight_TK)
        return self._one_by_one(x_TD.flatten(0, -2), chosen_TK, weight_TK).view_as(x_TD)

    def chosen_TK(self, args: Sequence[Tensor]) -> Tensor:
        """Which experts each token goes through, from the arguments of a call; -1: none."""
        if self.storage.calls == "chosen":
            return args[1]
        every_X = torch.arange(len(self), device=args[0].device)
        if self.storage.calls == "weighed":
            return every_X.expand(args[0].shape[:-1].numel(), -1)
        given_TX = args[0].unflatten(0, (len(self), -1)).ne(0).any(-1).T
        return torch.where(given_TX, every_X, -1)

    def _every(self, x_RD: Tensor, chosen_TX: Tensor) -> Tensor:
        """Returns y of X T rows, an expert after the other; rows of zeros stay zeros."""
        token_T = torch.arange(len(chosen_TX), device=x_RD.device)
        rows_XT = torch.arange(len(x_RD), device=x_RD.device).view(len(self), -1)
        y_RD = torch.zeros_like(x_RD)
        for index, expert in enumerate(self):
            rows = rows_XT[index][token_T[chosen_TX[:, index] == index]]
            if len(rows) or self.runs_idle or torch.is_grad_enabled():
                y_RD = y_RD.index_add(0, rows, expert(x_RD[rows]).to(y_RD.dtype))
        return y_RD

    def _plain(self) -> bool:
        dense = self.storage.for_kernels and all(type(expert).__name__ in DENSE for expert in self)
        parts = [module for expert in self for module in expert.modules()]
        watched = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        linears = [*self._parts("gate_up_proj"), *self._parts("down_proj")] if dense else []
        return dense and not watched and all(is_plain(linear) for linear in linears)

    def _all_as_one(self) -> tuple[Tensor, Tensor]:
        """Each matrix of all experts in one tensor; torch.compile takes what `lay_out` left."""
        if torch.compiler.is_compiling() and (laid_out := self.__dict__.get("_laid_out")):
            return laid_out
        return as_one(self._weights("gate_up_proj")), as_one(self._weights("down_proj"))

    def _apply(self, *args: Any, **options: Any) -> Any:
        """Forgets what was laid out where tensors are cast or moved."""
        self.__dict__.pop("_laid_out", None)
        applied: Any = super()._apply
        return applied(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves it out of copies, whose tensors are others."""
        return {name: value for name, value in self.__dict__.items() if name != "_laid_out"}

    def _parts(self, name: str) -> list[nn.Module]:
        return [expert.get_submodule(name) for expert in self]

    def _weights(self, name: str) -> list[Tensor]:
        return [linear.get_parameter("weight") for linear in self._parts(name)]

    def _one_by_one(self, x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Runs each expert on its tokens; with gradients, or under `runs_idle`, also on none.

        An expert without a token so gets gradients of zero, as the host's fused experts do.
        DistributedDataParallel waits for every gradient, and ZeRO gathers in every process the
        weights of the modules that run, in the order in which they run.
        """
        y_TD = torch.zeros_like(x_TD)
        for expert, rows in zip_longest(self, self._rows_of_experts(chosen_TK)):
            idle_runs = self.runs_idle or torch.is_grad_enabled()
            if len(rows) or (idle_runs and expert is not None):
                place, token = rows // len(chosen_TK), rows % len(chosen_TK)
                out_TD = x_TD[token] if expert is None else expert(x_TD[token])
                out_TD = out_TD * weight_TK[token, place, None]
                y_TD = y_TD.index_add(0, token, out_TD.to(y_TD.dtype))
        return y_TD

    def _rows_of_experts(self, chosen_TK: Tensor) -> Sequence[Tensor]:
        """Returns where each expert stands in `chosen_TK.T`, in the order of the host's own loop.

        The host waits for the device once, for the counts: asking each expert for its tokens would
        be one wait an expert. Numbers of no expert, before the first or after the last, are left
        out, as the host's loop leaves them out.
        """
        ranked = chosen_TK.T.flatten().sort(stable=True)
        borders = torch.arange(self.choices + 1, device=chosen_TK.device)
        ends = torch.searchsorted(ranked.values, borders)
        return ranked.indices.tensor_split(ends.cpu())[1:-1]

    def fuse_into(self, state: dict[str, Tensor], path: str) -> None:
        """Replaces the tensors of each expert in `state`, if any, by the host's fused ones."""
        for ours, host in self.storage.tensors.items():
            names = [f"{path}.{index}.{ours}" for index in range(len(self))]
            if names[0] in state:
                rows = [self._turned(ours, state.pop(name)) for name in names]
                if host == self.storage.up and f"{path}.idle_up" in state:
                    rows += state.pop(f"{path}.idle_up")
                state[f"{path}.{host}"] = (torch.cat if self.storage.flat else torch.stack)(rows)

    def split_from(self, state: dict[str, Tensor], path: str) -> None:
        """Replaces the host's fused tensors of `state` by those of each expert."""
        for ours, host in self.storage.tensors.items():
            whole = state.pop(f"{path}.{host}", None)
            if whole is None:
                continue
            whole = self.storage.each(whole)
            for index in range(len(self)):
                state[f"{path}.{index}.{ours}"] = self._turned(ours, whole[index])
            if len(whole) > len(self):
                state[f"{path}.idle_up"] = whole[len(self) :]

    def _turned(self, ours: str, tensor: Tensor) -> Tensor:
        """A tensor of one expert as the host keeps it, from ours, and the other way round."""
        return tensor.T if self.storage.is_turned(ours) and tensor.ndim == 2 else tensor

    @torch.no_grad()
    def lay_out(self) -> None:
        """Moves each matrix of all experts into one tensor, laid out as the kernels read it."""
        if not self.storage.for_kernels:
            return
        gate_up_XFD = torch.stack(self._weights("gate_up_proj"))
        down_XDF = lay_out(torch.stack(self._weights("down_proj")))
        for name, fused in (("gate_up_proj", gate_up_XFD), ("down_proj", down_XDF)):
            for weight, part in zip(self._weights(name), fused, strict=True):
                weight.data = part
        self.__dict__["_laid_out"] = (gate_up_XFD, down_XDF)


def unfuse_experts(model: nn.Module) -> None:
    """Takes every fused experts module of `model` apart in place; no weight is copied.

    From here on our module runs. Of the implementations that transformers knows it has two:
    `experts_implementation="moe_tools"`, and expert by expert.

    Raises:
        ValueError: experts that cannot be taken apart: they would go on computing what they did,
            whatever is done to the other FFNs.
    """
    opened = {path: take_apart(path, module) for path, module in fused_experts(model).items()}
    for path, module in opened.items():  # until here nothing was changed
        model.set_submodule(path, module)


def take_apart(path: str, fused: nn.Module, *, prove: bool = False) -> HostExperts:
    """Makes our module around views of the weights of a fused one, which stays as it is.

    Args:
        path: of the module.
        fused: the host's.
        prove: compare the two even where transformers itself says how the host keeps its experts.

    Raises:
        ValueError: as `unfuse_experts`.
    """
    storage = check_fused(path, fused)
    experts = expert_views(fused, storage)
    up = storage.each(fused.get_parameter(storage.up))
    idle_up = up[len(experts) :] if len(up) > len(experts) else None
    made = HostExperts(experts, getattr(fused, "config", None), storage, idle_up)
    if prove or not storage.proven:
        prove_experts(path, fused, made, storage, made.choices)
    return made.train(fused.training)


def chosen_share(model: nn.Module, name: str) -> float:
    """Returns the share of the tokens that the FFN of a name sees: K / X of an MoE host's expert.

    The host's router is taken to spread them evenly.
    """
    path = name.rpartition(".")[0]
    host = model.get_submodule(path)
    if isinstance(host, HostExperts):
        storage, experts = host.storage, host.choices
    elif is_fused(host):
        storage = check_fused(path, host)
        experts = len(storage.each(host.get_parameter(storage.up)))
    else:
        return 1.0
    return 1.0 if storage.calls == "weighed" else chosen_experts(model, path) / experts


def chosen_experts(model: nn.Module, path: str) -> int:
    """Returns K, how many experts the host chooses for a token.

    Raises:
        ValueError: its config does not say it, or has another number for each layer.
    """
    config: Any = model.config
    config = config.get_text_config()
    parts = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    found = [getattr(part, key, None) for part in (config, *parts) for key in CHOSEN_KEYS]
    chosen = next((number for number in found if isinstance(number, int)), None)
    if chosen is None:
        raise ValueError(
            f"{path}: {type(config).__name__} does not say how many experts are chosen for a "
            f"token: none of {', '.join(CHOSEN_KEYS)} is a number, so the work per token is unknown"
        )
    return chosen


@torch.no_grad()
def fill_experts(fused: nn.Module, weights: FFNWeights) -> None:
    """Makes every expert of a fused module a copy of one gated FFN without biases."""
    assert weights.gate_FD is not None
    gate_up_FD = torch.cat([weights.gate_FD, weights.up_FD])
    fused.get_parameter("gate_up_proj").copy_(gate_up_FD)  # one for all X
    fused.get_parameter("down_proj").copy_(weights.down_FD.T)
