"""The state dict of a converted model as its stock class would give it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moe_tools.hosts.ffn import host_state_dict


@contextmanager
def host_names(model: nn.Module) -> Iterator[None]:
    """While it lasts, `model.state_dict()` gives `host_state_dict`.

    What saves a quantised model asks the model itself for its tensors, whatever it is given.
    """
    kept = vars(model).get("state_dict")
    own: Any = model.state_dict

    def state_dict(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return host_state_dict(model, own(*args, **kwargs))

    vars(model)["state_dict"] = state_dict
    try:
        yield
    finally:
        del vars(model)["state_dict"]
        if kept is not None:  # nested, or another library's
            vars(model)["state_dict"] = kept
