"""Changes of several layers computed together: groups, folds, projections, and the slice of every layer."""
