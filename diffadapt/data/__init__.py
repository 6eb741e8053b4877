"""Training data: examples, their order, and their way to encoded batches."""
