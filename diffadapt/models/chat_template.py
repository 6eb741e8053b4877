"""Chat templates around captions that a language model reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "diffadapt-caption"  # where the caption would be; no template contains it


def tokens_before_caption(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the template of a user's message puts before its text.

    What is behind a text that is too long is cut off before the text itself.
    """
    message = [{"role": "user", "content": _MARK}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return token_count(tokenizer, text.partition(_MARK)[0])


def token_count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a part of a template, without the special tokens of a whole text."""
    return len(tokenizer(text, add_special_tokens=False).input_ids)
