"""Captions as they stand in cells of metadata and data sets, and in text files beside images."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from diffadapt.common.atomic_files import read_text
from diffadapt.common.messages import indented_list
from diffadapt.common.symlinks import escapes_root

CAPTION_COLUMNS = ("text", "caption", "prompt")  # tried in this order when no column is named
CAPTION_ENDINGS = (".txt", ".caption")  # of files beside images, in any case
MISSING = frozenset(
    ("", "nan", "null", "none", "<na>", "n/a")
)  # what programs write where there is no caption


def choose_caption_column(columns: Sequence[str], wanted: str | None, place: object) -> str:
    """The column of captions: the one that is wanted, or the first usual name.

    Raises: ValueError that lists the columns.
    """
    candidates = CAPTION_COLUMNS if wanted is None else (wanted,)
    for name in candidates:
        if name in columns:
            return name
    tried = " or ".join(repr(name) for name in candidates)
    raise ValueError(f"{place} has no column {tried}; --caption_column is one of: {', '.join(columns)}")


def parse_caption(cell: object, place: str) -> str:
    """The caption in a cell, on one line; of several the first. Empty where there is none.

    None, NaN and the words that programs write for them (nan, null, None) are no caption.

    Args:
        place: file and line, for messages.
    Raises: ValueError for what is no text: numbers, truth values, mappings.
    """
    if isinstance(cell, list | tuple):
        texts = (parse_caption(item, place) for item in cell)
        return next((text for text in texts if text), "")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if not isinstance(cell, str):
        raise ValueError(
            f"{place}: the caption is {str(cell)[:80]!r} of type {type(cell).__name__}, not text; "
            "put it in quotes, or name another column with --caption_column"
        )
    if any(unicodedata.category(character) == "Cs" for character in cell):
        raise ValueError(
            f"{place}: the caption {cell[:80]!a} has half of a surrogate pair; repair its encoding"
        )
    text = " ".join(cell.split())
    return "" if text.casefold() in MISSING else text


class CaptionFiles:
    """The text files of a folder, by the image that they stand beside.

    Names are compared in Unicode's composed form: one program writes "é" as one character, another as two.

    Args:
        files: all files of the folder.
        folder: that links must not leave.
    """

    def __init__(self, files: Sequence[Path], folder: Path, *, follow_links: bool = False):
        self._folder = folder
        self._follow_links = follow_links
        self._files: dict[tuple[str, str], list[Path]] = {}
        for path in files:
            if path.suffix.lower() in CAPTION_ENDINGS:
                self._files.setdefault(_key(path), []).append(path)

    def beside(self, image: Path) -> list[Path]:
        """The files beside an image: none, or those with its name and an ending of captions."""
        return self._files.get(_key(image), [])

    def caption(self, image: Path) -> str:
        """The caption beside an image; empty where there is none.

        Raises: ValueError for two files that say different things, one that is not UTF-8, and links out of
            the folder.
        """
        outside = [path for path in self.beside(image) if escapes_root(path, self._folder)]
        if outside and not self._follow_links:
            raise ValueError(
                f"{outside[0]} is a link out of {str(self._folder)!r}; copy the file, or give --follow_links"
            )
        texts = {path: parse_caption(read_text(path), str(path)) for path in self.beside(image)}
        captions = set(texts.values()) - {""}
        if len(captions) > 1:
            names = [f"{path}: {text[:80]!r}" for path, text in texts.items()]
            raise ValueError(f"{image} has two captions; remove one of the files:\n{indented_list(names)}")
        return captions.pop() if captions else ""


def to_nfc(name: str) -> str:
    """A name in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name)


def _key(path: Path) -> tuple[str, str]:
    return str(path.parent), to_nfc(path.stem)
