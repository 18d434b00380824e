"""Models in folders: load, save, and transformers' own loading."""
