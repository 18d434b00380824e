"""Lets the last launch of an FFN on a GPU add the residual of its layer.

Letters: T tokens (any leading dimensions), D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moe_tools.experts.hooks import all_are_heard
from moe_tools.experts.packed_ffn import PackableFFN
from moe_tools.inference import layer_forms
from moe_tools.inference.in_front import InFront, put_in_front
from moe_tools.kernels.packed import is_like


def fuse_residuals(model: nn.Module) -> None:
    """Changes, in place, the layers of a known form whose FFN adds a residual for nothing.

    Their form is h + attention(norm(h)), then h + FFN(norm(h)), the code of transformers' Llama.
    """
    for layer in model.modules():
        host: Any = type(layer)
        if _adds(layer._modules.get(layer_forms.FFN)) and layer_forms.is_pre_norm(host):
            put_in_front(ResidualLayer, layer)


class ResidualLayer(InFront):
    """What `fuse_residuals` puts in front of the class of a layer."""

    made = ()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Computes h behind the layer; as the host does where a hook wants to see y of the FFN."""
        ffn = self.get_submodule(layer_forms.FFN)
        if args or not _adds(ffn):
            return super().forward(hidden_states, *args, **kwargs)
        attention = self.get_submodule(layer_forms.ATTENTION)
        h_TD = self.get_submodule(layer_forms.INTO_ATTENTION)(hidden_states)
        h_TD = hidden_states + attention(hidden_states=h_TD, **kwargs)[0]
        x_TD = self.get_submodule(layer_forms.INTO_FFN)(h_TD)
        return ffn(x_TD, residual_TD=h_TD) if is_like(h_TD, x_TD) else h_TD + ffn(x_TD)


def _adds(ffn: nn.Module | None) -> bool:
    """Whether an FFN's kernels add a residual, and nobody hears what goes in and comes out."""
    if not isinstance(ffn, PackableFFN) or ffn.packed is None or not ffn.packed.adds:
        return False
    heard = ffn._forward_hooks or ffn._forward_pre_hooks or "forward" in ffn.__dict__
    return not (heard or all_are_heard() or ffn.training)
