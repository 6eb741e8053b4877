"""Sets of images to score."""
