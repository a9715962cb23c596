"""Training: a recipe becomes a trained network."""
