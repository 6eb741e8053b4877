"""Figures of generated images: pure functions on features."""
