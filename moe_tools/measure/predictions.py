"""Counts how well neuron predictors predict while a model runs under them.

Letters: T tokens, D model width, F neurons, R experts that are routed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from moe_tools.experts.experts import ExpertFFN, Routing, expert_ffns
from moe_tools.experts.prediction import Prediction
from moe_tools.experts.routing import observed_with_input
from moe_tools.experts.tokens import valid_tokens
from moe_tools.hosts.zeros import gives_zeros


@contextmanager
def count_predictions(model: nn.Module) -> Iterator[dict[str, Prediction]]:
    """Yields FFN name -> counts, for FFNs whose neurons are predicted to be 0 or not.

    That is where experts are neurons, and the activation leaves some at 0, or the router was
    trained to call small ones 0. Counts grow with each pass.

    The truth is what the neuron would be on the same input, which the predictions of earlier FFNs
    have shaped; neurons that always run are not counted, nor is padding. Every neuron is computed
    for it once more, and no output changes. A model without such FFNs yields nothing and loses no
    time.
    """
    ffns = [ffn for ffn in expert_ffns(model) if ffn.division.of_neurons and _has_zeros(ffn)]
    counts = {ffn.name: Prediction() for ffn in ffns}
    if not ffns:
        yield counts
        return
    with valid_tokens(model) as tokens, ExitStack() as watches:
        for ffn in ffns:
            see = _counting(ffn, counts[ffn.name])
            watches.enter_context(observed_with_input(ffn, tokens, see))
        yield counts


def _has_zeros(ffn: ExpertFFN) -> bool:
    return ffn.router.zero_below > 0 or gives_zeros(ffn.projections.act)


def _counting(ffn: ExpertFFN, count: Prediction) -> Callable[[Routing, Tensor], None]:
    def see(routing: Routing, x_TD: Tensor) -> None:
        h_TF = ffn.hidden(routing.of_tokens(x_TD))
        nonzero_TR = ffn.importance().nonzero_TR(h_TF, ffn.router.zero_below)
        count.add(routing.of_tokens(routing.mask_TE)[..., ffn.shared :], nonzero_TR)

    return see
