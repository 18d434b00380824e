"""Models behind an address: OpenAI's HTTP interface."""
