"""Families of base models: one file each, with loading, encoding, predicting and the defaults that fit it."""
