"""Makes models ready for inference: packed FFNs, quantised linears, kernels in MoE hosts."""
