"""Names that several parts must spell alike: files of a folder, marks in a config."""

from __future__ import annotations

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Files of a Hugging Face folder: configuration, weights in one file, index of several."""

RECIPE = "recipe.yaml"
METRICS = "metrics.json"
STEPS_FOLDER = "steps"
LOGS = "logs"
CONTROL = "control"
"""Files and folders of a run (`moe_tools.runs.folder`)."""

README = "README.md"
FIGURES = "figures.json"
SWEEP = "sweep.json"
"""The model card, and the figures that it and the page of `moe-tools inspect` read."""

OURS = "moe_tools."
"""How the name of an activation begins that no stock class knows."""
IGNORE = -100
"""The label of a token that is not predicted, as PyTorch's cross entropy has it."""
