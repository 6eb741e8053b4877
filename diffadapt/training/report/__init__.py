"""The report of a run: losses, images before and after training, metrics, the model card."""
