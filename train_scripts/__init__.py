"""The training scripts; installed as `diffadapt.scripts`."""
