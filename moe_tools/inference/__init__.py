"""Makes models ready for inference: packed FFNs and linears, kernels in MoE hosts."""
