"""Prompts longer than a text encoder reads."""

from __future__ import annotations

from collections.abc import Sequence

from diffadapt.common.messages import indented_list
from diffadapt.evaluation.features.extractors.base import Extractor

SHOWN = 3  # prompts named in a warning
BEGINNING = 60  # characters of each


def cut_prompts(label: str, prompts: Sequence[str], extractor: Extractor) -> list[str]:
    """A warning about the prompts of a set of which an extractor compares the beginning alone."""
    if extractor.count_tokens is None or not prompts:
        return []
    texts = list(dict.fromkeys(prompts))
    counts = dict(zip(texts, extractor.count_tokens(texts), strict=True))
    longer = [
        f"{text[:BEGINNING]!r}... ({n} tokens)" for text, n in counts.items() if n > extractor.text_length
    ]
    if not longer:
        return []
    return [
        f"{label}: {len(longer)} of {len(texts)} prompts are longer than the {extractor.text_length} tokens "
        f"that {extractor.name} reads; images are compared with their beginnings:\n"
        f"{indented_list(longer, limit=SHOWN)}"
    ]
