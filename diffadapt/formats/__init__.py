"""Files of adapters: the format of diffadapt, and those of other programs."""
