"""Tools for those who work on the kernels: run from the root of a checkout, never installed."""
