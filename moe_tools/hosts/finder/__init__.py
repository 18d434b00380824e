"""Finds FFNs without names, from the autograd graph of a small model."""
