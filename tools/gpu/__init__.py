"""Everything that only a GPU can say, in one command and a few minutes: `python -m tools.gpu`."""
