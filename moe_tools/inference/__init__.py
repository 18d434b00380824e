"""Models made for inference: packed FFNs, quantised linears."""
