"""Train steps: gradients through the whole model, on one device or many."""
