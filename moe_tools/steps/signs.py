"""Which way up rows point before dReLU cuts what is negative. Letters: T tokens, F neurons.

A neuron of a gated FFN may be turned: with up row and down column negated it computes the same.
dReLU does not: it keeps max(up x, 0), so one side of every neuron goes. Ours: the side to keep is
the one with more of the neuron's energy while its gate is on. TurboSparse (arXiv 2406.05955)
swaps as the donor happens to be and leaves the rest to 150B tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_tools.data import Blocks
from moe_tools.hosts.activations import JointActivation
from moe_tools.hosts.ffn import find_ffns, turn_neurons
from moe_tools.steps.calibrate import visit_activations


def align_signs(model: nn.Module, blocks_BT: Blocks) -> dict[str, float]:
    """Turns neurons towards their larger side, sum over tokens of (relu(gate x) * up x)^2.

    The model computes what it did, to the last bit; ties stay as they are.

    Args:
        model: dense and gated, with the donor's activation.
        blocks_BT: calibration text.

    Returns:
        Name of every FFN -> the share of that energy which dReLU now keeps; 1 where there is none.

    Raises:
        ValueError: dReLU already, which turning would change, or an MoE expert that saw no token.
    """
    ffns = find_ffns(model)
    for ffn in ffns:
        if isinstance(ffn.act, JointActivation):
            raise ValueError(f"swap: {ffn.name} is dReLU already: align before it, not after")
    kept_F: list[Tensor | float] = [0.0] * len(ffns)
    lost_F: list[Tensor | float] = [0.0] * len(ffns)

    def visit(index: int, x_TD: Tensor, _: Tensor) -> None:
        up_TF, gate_TF = ffns[index].projections.rows_TF(x_TD)
        assert gate_TF is not None
        h_TF = gate_TF.float().relu() * up_TF.float()
        kept_F[index] += h_TF.relu().square().sum(0)
        lost_F[index] += (-h_TF).relu().square().sum(0)

    visit_activations(model, blocks_BT, visit, title="align signs")
    shares = {}
    for ffn, kept, lost in zip(ffns, kept_F, lost_F, strict=True):
        assert isinstance(kept, Tensor) and isinstance(lost, Tensor)
        turn_neurons(ffn, 1 - 2 * (lost > kept).float())
        whole = float((kept + lost).sum())
        shares[ffn.name] = float(kept.maximum(lost).sum()) / whole if whole else 1.0
    return shares
