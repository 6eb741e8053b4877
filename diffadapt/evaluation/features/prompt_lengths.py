"""Warnings about prompts longer than a text encoder reads."""

from __future__ import annotations

from collections.abc import Sequence

from diffadapt.common.messages import indented_list
from diffadapt.evaluation.features.extractors.base import Extractor

MAX_LISTED = 3  # prompts named in a warning
SHOWN_CHARACTERS = 60  # of each


def long_prompts_warning(label: str, prompts: Sequence[str], extractor: Extractor) -> list[str]:
    """A warning about prompts of a set that an extractor truncates before it compares images with them."""
    if extractor.count_tokens is None or not prompts:
        return []
    texts = list(dict.fromkeys(prompts))  # several images may share one
    too_long = []
    for text, num_tokens in zip(texts, extractor.count_tokens(texts), strict=True):
        if num_tokens > extractor.text_length:
            too_long.append(f"{text[:SHOWN_CHARACTERS]!r}... ({num_tokens} tokens)")
    if not too_long:
        return []
    return [
        f"{label}: {len(too_long)} of {len(texts)} prompts are longer than the {extractor.text_length} "
        f"tokens that {extractor.name} reads; images are compared with their beginnings:\n"
        f"{indented_list(too_long, limit=MAX_LISTED)}"
    ]
