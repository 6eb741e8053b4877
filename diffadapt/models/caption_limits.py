"""What of a caption is too long to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CaptionLimit:
    """How much of a caption is read behind one tokenizer.

    Attributes:
        tokenizer: of the pipeline.
        length: tokens of a caption that are read, without special tokens and templates.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int


@dataclass(frozen=True)
class TruncatedCaption:
    """A caption that is longer than a tokenizer takes.

    Attributes:
        caption: as given.
        length: tokens it has.
        limit: tokens that are read.
        lost: the words that are not read.
    """

    caption: str
    length: int
    limit: int
    lost: str


def tokenizer_limit(tokenizer: PreTrainedTokenizerBase) -> CaptionLimit:
    """The limit that a tokenizer itself has."""
    return CaptionLimit(tokenizer, tokenizer.model_max_length - tokenizer.num_special_tokens_to_add())


def truncated_captions(limits: Sequence[CaptionLimit], captions: Sequence[str]) -> list[TruncatedCaption]:
    """Distinct captions of which the end is not read, in the order of the captions."""
    truncated: dict[TruncatedCaption, None] = {}  # a set in order
    for caption in dict.fromkeys(captions):
        for limit in limits:
            entry = _truncated_caption(limit, caption)
            if entry is not None:
                truncated[entry] = None
    return list(truncated)


def _truncated_caption(limit: CaptionLimit, caption: str) -> TruncatedCaption | None:
    """The part of a caption that is cut off; None when the whole caption fits."""
    ids = limit.tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
    if len(ids) <= limit.length:
        return None
    lost = limit.tokenizer.decode(ids[limit.length :]).strip()
    return TruncatedCaption(caption, len(ids), limit.length, lost)
