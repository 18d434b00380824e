"""Takes padding out of what a forward pass showed, before anything is computed of it.

Letters: B rows, T tokens, X anything that a token has.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from moe_tools.data import Batch, Batches
from moe_tools.experts.experts import Routing
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.training.losses import Observed, seen_kinds


def without_padding(seen: Observed, batch: Batch) -> Observed:
    """What was seen of the tokens of a batch; the same where it has no padding."""
    if batch.mask_BT is None:
        return seen

    def kept(found_TX: Tensor) -> Tensor:
        assert batch.mask_BT is not None
        rows_TX = found_TX.reshape(-1, found_TX.shape[-1])
        assert len(rows_TX) == batch.mask_BT.numel()  # check_padding
        return rows_TX[batch.mask_BT.flatten()]

    return Observed(
        [_of_tokens(routing) for routing in seen.routings],
        {name: kept(y_TD) for name, y_TD in seen.outputs_TD.items()},
        {name: kept(y_TD) for name, y_TD in seen.donor_outputs_TD.items()},
        [kept(h_TF) for h_TF in seen.hidden_TF],
        [kept(pre_TF) for pre_TF in seen.pre_TF],
    )


def _of_tokens(routing: Routing) -> Routing:
    scores_TE, mask_TE = (routing.of_tokens(one) for one in (routing.scores_TE, routing.mask_TE))
    return routing._replace(scores_TE=scores_TE, mask_TE=mask_TE, valid_T=None)


def check_padding(model: nn.Module, losses: Sequence[str], text: Sequence[Batch]) -> None:
    """Whether padding can be told from tokens in all that the losses look at.

    Raises:
        ValueError: they look into the experts of an MoE host, which get some of the rows.
    """
    padded = isinstance(text, Batches) and text.packing == "padded"
    kinds = seen_kinds(losses) & {"hidden", "pre"}
    if padded and kinds and any(isinstance(one, HostExperts) for one in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has experts of its own, inside which the losses "
            f"{', '.join(losses)} cannot tell padding from tokens: use packing: isolated"
        )
