"""The commands of `diffadapt`, one file each: its options, and what it does."""
