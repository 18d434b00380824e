"""Registers the kernels as an experts implementation of transformers.

    register_experts()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_tools")
    lay_out_experts(model)

Letters: D model width, F neurons of one expert, X experts of the host.
"""

from __future__ import annotations

import inspect

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_tools.hosts.fused import check_fused, fused_experts
from moe_tools.hosts.moe_host import HostExperts
from moe_tools.hosts.moe_kernels import IMPLEMENTATION, lay_out, run_experts
from moe_tools.kernels.sparse_ffn import backends, triton_kernels


def register_experts() -> None:
    """Makes `experts_implementation="moe_tools"` known to transformers. It may be called twice.

    For from_pretrained, and for `set_experts_implementation` of a model that is there, swapped
    ones included. On a GPU the Triton kernels run, on a CPU the reference, expert by expert.
    """
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _run_fused)
    if "triton" in backends():
        triton_kernels("moe")  # before torch.compile, which traces no import


def lay_out_experts(model: nn.Module) -> None:
    """Lays the experts' weights out as the kernels read them, in place: W_down neuron by neuron.

    Without it the kernels copy W_down in every call. Values, shapes and names stay; the extra
    memory is that of one layer's experts, for a moment. Call it once, where the model is to run,
    before an optimizer or a wrapper takes its parameters into tensors of its own.

    Raises:
        ValueError: experts that moe-tools cannot read.
    """
    fused = fused_experts(model)
    stored = {path: check_fused(path, module) for path, module in fused.items()}  # changes nothing
    for path, module in fused.items():
        if stored[path].for_kernels:
            _lay_out(module, stored[path].transposed)
    for module in model.modules():
        if isinstance(module, HostExperts):
            module.lay_out()


def _lay_out(fused: nn.Module, transposed: bool) -> None:
    """Copies the matrix whose neurons are columns: gate and up where transposed, else W_down."""
    matrix = fused.get_parameter("gate_up_proj" if transposed else "down_proj")
    matrix.data = lay_out(matrix)


def _run_fused(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Computes y_TD, with the signature that transformers calls.

    Experts with biases, without a gate or with a gate of the host's own run as the host runs them
    by itself, one by one: no kernel of ours knows them.

    Raises:
        ValueError: experts that moe-tools cannot read, or spread over devices.
    """
    storage = check_fused(f'experts_implementation="{IMPLEMENTATION}"', module)
    routing = (top_k_index, top_k_weights)
    if not storage.for_kernels:
        eager = inspect.unwrap(type(module).forward)
        y_TD: Tensor = eager(module, hidden_states, *routing)
        return y_TD
    gate_up: Tensor = module.get_parameter("gate_up_proj")
    down: Tensor = module.get_parameter("down_proj")
    if storage.transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    return run_experts(gate_up, down, module.get_submodule("act_fn"), hidden_states, *routing)
