"""Training: options, the objective, the loop and its exact state."""
