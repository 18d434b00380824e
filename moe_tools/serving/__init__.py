"""Converted models in programs that serve models."""
