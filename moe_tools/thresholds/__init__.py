"""Inputs that linears are not given: where, below which size, and what a config says of it."""
