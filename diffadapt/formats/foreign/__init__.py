"""Opening what other tools trained: kohya and LyCORIS files, PEFT folders, diffusers' LoRA files."""

from diffadapt.formats.foreign.attach import attach_foreign
from diffadapt.formats.foreign.open import ForeignAdapter, open_foreign

__all__ = ["ForeignAdapter", "attach_foreign", "open_foreign"]
