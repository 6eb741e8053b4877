"""The trigger word of a style, added to captions that do not contain it."""

from __future__ import annotations

import unicodedata

# Scripts that write no spaces between words.
UNSPACED_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def add_trigger_word(caption: str | int, trigger_word: str | None) -> str | int:
    """Puts the trigger word before a caption that does not contain it; a class number stays as it is."""
    if trigger_word is None or isinstance(caption, int) or contains_word(caption, trigger_word):
        return caption
    return f"{trigger_word} {caption}"


def contains_word(text: str, word: str) -> bool:
    """Whether a word, or several words with spaces, occurs in a text and is not part of a longer word.

    Case is ignored, since CLIP's tokenizers convert to lower case. In scripts that write no spaces any
    occurrence counts.
    """
    text = _normalize(text)
    word = _normalize(word)
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        if not _is_within_word(text, start) and not _is_within_word(text, end):
            return True
        start = text.find(word, start + 1)
    return False


def _normalize(text: str) -> str:
    """The text in a form in which equal words are equal strings: composed, without case, single spaces."""
    # Case folding may decompose characters, so the text is composed again after it.
    folded = unicodedata.normalize("NFC", text).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def _is_within_word(text: str, place: int) -> bool:
    """Whether the characters before and at a place belong to one word."""
    if not 0 < place < len(text):
        return False
    return _is_word_character(text[place - 1]) and _is_word_character(text[place])


def _is_word_character(character: str) -> bool:
    """Whether a character is part of words: a letter, digit, accent or underscore of a script with spaces."""
    if unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS):
        return False
    return character == "_" or unicodedata.category(character)[0] in "LMN"
