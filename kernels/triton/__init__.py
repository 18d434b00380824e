"""`sparse_ffn` in Triton: forward and backward, for NVIDIA and AMD GPUs. See docs/kernels.md."""
