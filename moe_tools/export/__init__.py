"""Where a model can go from here: one file a format."""
