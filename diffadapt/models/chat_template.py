"""Chat templates around captions that a language model reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

_MARK = "diffadapt-caption"  # where the caption would be; no template contains it


def tokens_before_caption(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin, *, system_message: str | None = None
) -> int:
    """Tokens that the template of a user's message puts before its text.

    What is behind a text that is too long is cut off before the text itself.

    Args:
        tokenizer: a tokenizer, or a processor of texts and images.
        system_message: what a system message before the user's says; then all messages are lists of parts.
    """
    messages: list[dict[str, object]] = [{"role": "user", "content": _MARK}]
    if system_message is not None:
        messages = [_message_of_parts("system", system_message), _message_of_parts("user", _MARK)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return token_count(getattr(tokenizer, "tokenizer", tokenizer), text.partition(_MARK)[0])


def _message_of_parts(role: str, text: str) -> dict[str, object]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def token_count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a part of a template, without the special tokens of a whole text."""
    return len(tokenizer(text, add_special_tokens=False).input_ids)
