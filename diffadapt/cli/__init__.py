"""The `diffadapt` command line, one module for each command."""
