"""Checkpoints of a run, and what may change when it is resumed."""
