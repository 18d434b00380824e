"""How any host model keeps its FFNs, and the activations that an FFN can have."""
