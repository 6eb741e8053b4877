"""Scoring of image sets: extractors and their weights, image sets, features, the record of a result."""
