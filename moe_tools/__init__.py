"""Turn a dense language model into one that computes only what a token needs, and prove it."""

__version__ = "0.1.0"
