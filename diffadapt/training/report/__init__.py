"""What a run reports: losses, images before and after, scores, the model card."""
