"""Helpers for all other packages: files, messages, images, random numbers, the process."""
