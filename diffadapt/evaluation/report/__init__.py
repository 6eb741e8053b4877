"""Pages, plots, tables and contact sheets of scores."""
