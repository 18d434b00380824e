"""How well neuron predictors predict while a model runs under them: four counts an FFN.

Letters: T tokens, D model width, F neurons, R experts that are routed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from moe_tools.experts.experts import ExpertFFN, expert_ffns
from moe_tools.experts.prediction import Prediction
from moe_tools.experts.routing import Routing


@contextmanager
def count_predictions(model: nn.Module) -> Iterator[dict[str, Prediction]]:
    """Yields name -> counts, that grow with each forward pass, of FFNs with experts of one neuron.

    The truth is what the neuron would be on the same input, which the predictions of earlier FFNs
    have shaped; neurons that always run are not counted. Every neuron is computed for it once more,
    and no output changes. A model without such FFNs yields nothing and loses no time.
    """
    ffns = [ffn for ffn in expert_ffns(model) if ffn.division.of_neurons]
    counts = {ffn.name: Prediction() for ffn in ffns}
    with ExitStack() as watches:
        for ffn in ffns:
            watches.enter_context(_watch(ffn, counts[ffn.name]))
        yield counts


@contextmanager
def _watch(ffn: ExpertFFN, count: Prediction) -> Iterator[None]:
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [args[0]]

    def see(routing: Routing) -> None:
        h_TF = ffn.hidden(inputs.pop())
        nonzero_TR = ffn.importance().nonzero_TR(h_TF, ffn.router.zero_below)
        count.add(routing.mask_TE[..., ffn.shared :], nonzero_TR)

    handle = ffn.register_forward_pre_hook(keep)
    ffn.observers.append(see)
    try:
        yield
    finally:
        ffn.observers.remove(see)
        handle.remove()
