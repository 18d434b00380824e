"""Converted models behind an address: OpenAI's HTTP interface, and vLLM."""
