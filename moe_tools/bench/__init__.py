"""Time things: an FFN, its kernels, generation, a training step, clustering."""
