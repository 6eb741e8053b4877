"""Adapters on a model: attach, merge, detach, count and fit to a budget."""
