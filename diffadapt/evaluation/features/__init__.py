"""Features of images: extractors, their weights, extraction in batches, caches."""
