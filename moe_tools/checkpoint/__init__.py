"""Loads and saves models in folders, and makes transformers load converted ones."""
