"""Images and captions on their way to the model."""
