"""Benchmarks: one FFN, its kernels, generation, a training step, clustering."""
