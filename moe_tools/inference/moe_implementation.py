"""Registers the kernels as an experts implementation of transformers.

    register_experts()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_tools")
    lay_out_experts(model)

Letters: D model width, F neurons of one expert, X experts of the host.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_tools.hosts.moe_host import HostExperts, check_fused, fused_experts
from moe_tools.hosts.moe_kernels import IMPLEMENTATION, lay_out, run_experts


def register_experts() -> None:
    """Makes `experts_implementation="moe_tools"` known to transformers. It may be called twice.

    For from_pretrained, and for `set_experts_implementation` of a model that is there, swapped
    ones included. On a GPU the Triton kernels run, on a CPU the reference, expert by expert.
    """
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _run_fused)


def lay_out_experts(model: nn.Module) -> None:
    """Lays the experts' weights out as the kernels read them, in place: W_down neuron by neuron.

    Without it the kernels copy W_down in every call. Values, shapes and names stay; the extra
    memory is that of one layer's experts, for a moment. Call it once, where the model is to run,
    before an optimizer or a wrapper takes its parameters into tensors of its own.

    Raises:
        ValueError: experts that moe-tools does not know.
    """
    fused = fused_experts(model)
    for path, module in fused.items():  # first all checks, then the first change
        check_fused(path, module)
    for module in fused.values():
        down_XDF = module.get_parameter("down_proj")
        down_XDF.data = lay_out(down_XDF)
    for module in model.modules():
        if isinstance(module, HostExperts):
            module.lay_out()


def _run_fused(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Computes y_TD, with the signature that transformers calls.

    Raises:
        ValueError: experts of an unknown class, or spread over devices.
    """
    check_fused(f'experts_implementation="{IMPLEMENTATION}"', module)
    weights = (module.get_parameter("gate_up_proj"), module.get_parameter("down_proj"))
    act = module.get_submodule("act_fn")
    return run_experts(*weights, act, hidden_states, top_k_index, top_k_weights)
