"""The trigger word of a style: put before a caption that does not hold it as a word."""

from __future__ import annotations

import unicodedata

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # scripts without word spaces


def add_trigger_word(caption: str | int, trigger_word: str | None) -> str | int:
    """The caption with the trigger word before it, unless it holds that word; a class stays as it is."""
    if trigger_word is None or isinstance(caption, int) or contains_word(caption, trigger_word):
        return caption
    return f"{trigger_word} {caption}"


def contains_word(text: str, word: str) -> bool:
    """Whether a word, or several with spaces, stands in a text and is not part of a longer word.

    Capitals do not matter: CLIP's tokenizers make them small. In scripts without spaces between words any
    place counts.
    """
    text = _comparable(text)
    word = _comparable(word)
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        if not _joins(text, start) and not _joins(text, end):
            return True
        start = text.find(word, start + 1)
    return False


def _comparable(text: str) -> str:
    composed = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(composed.split())


def _joins(text: str, place: int) -> bool:
    """Whether the characters before and at a place belong to one word."""
    if not 0 < place < len(text):
        return False
    return _is_letter(text[place - 1]) and _is_letter(text[place])


def _is_letter(character: str) -> bool:
    """Whether a character is part of words: a letter, a digit, an accent or an underscore."""
    if unicodedata.name(character, "").startswith(UNSPACED):
        return False
    return character == "_" or unicodedata.category(character)[0] in "LMN"
