"""What a recipe does to a model: the verbs."""
