"""Measures models: quality, sparsity, cost, memory."""
