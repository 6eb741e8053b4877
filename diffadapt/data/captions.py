"""Captions in cells of metadata and data sets, and in text files beside images."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from diffadapt.common.atomic_files import read_text
from diffadapt.common.messages import indented_list
from diffadapt.common.symlinks import escapes_root

CAPTION_COLUMNS = ("text", "caption", "prompt")  # tried in this order if no column is named
CAPTION_SUFFIXES = (".txt", ".caption")  # of files beside images, in any case
MISSING = frozenset(("", "nan", "null", "none", "<na>", "n/a"))  # what programs write for a missing caption


def choose_caption_column(columns: Sequence[str], requested: str | None, place: object) -> str:
    """The column of captions.

    Args:
        columns: the columns of the table.
        requested: the value of `--caption_column`; None for the first of CAPTION_COLUMNS.
        place: the table, for messages.

    Raises:
        ValueError: there is no such column; the message lists the columns.
    """
    candidates = CAPTION_COLUMNS if requested is None else (requested,)
    for name in candidates:
        if name in columns:
            return name
    names = " or ".join(map(repr, candidates))
    raise ValueError(f"{place} has no column {names}; --caption_column is one of: {', '.join(columns)}")


def parse_caption(cell: object, place: str) -> str:
    """The caption in a cell, on one line.

    Args:
        cell: a text, or a list of texts, of which the first one is the caption. None, NaN and the words that
            programs write for them (nan, null, None) are no caption.
        place: file and line, for messages.

    Returns:
        The caption; empty if there is none.

    Raises:
        ValueError: the cell is of another type, such as a number.
    """
    if isinstance(cell, list | tuple):
        for item in cell:
            caption = parse_caption(item, place)
            if caption:
                return caption
        return ""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if not isinstance(cell, str):
        raise ValueError(
            f"{place}: the caption is {str(cell)[:80]!r} of type {type(cell).__name__}, not text; "
            "put it in quotes, or name another column with --caption_column"
        )
    # Category Cs: halves of surrogate pairs, which UTF-8 cannot encode.
    if any(unicodedata.category(character) == "Cs" for character in cell):
        raise ValueError(
            f"{place}: the caption {cell[:80]!a} has half of a surrogate pair; repair its encoding"
        )
    text = " ".join(cell.split())
    return "" if text.casefold() in MISSING else text


class CaptionFiles:
    """The caption files of a folder, found by the image that they lie beside.

    Names are compared in Unicode's composed form, since some programs write "é" as one character and others
    as two.

    Args:
        files: all files of the folder.
        folder: the folder, which links must not leave.
        follow_links: follow links out of the folder too.
    """

    def __init__(self, files: Sequence[Path], folder: Path, *, follow_links: bool = False):
        self._folder = folder
        self._follow_links = follow_links
        self._files: dict[tuple[str, str], list[Path]] = {}
        for path in files:
            if path.suffix.lower() in CAPTION_SUFFIXES:
                self._files.setdefault(_key(path), []).append(path)

    def beside(self, image: Path) -> list[Path]:
        """The caption files of an image: those with its name and a suffix of captions."""
        return self._files.get(_key(image), [])

    def caption(self, image: Path) -> str:
        """The caption of an image from the file beside it; empty if there is none.

        Raises:
            ValueError: there are two files with different captions, a file is not UTF-8, or it is a link out
                of the folder.
        """
        texts: dict[Path, str] = {}
        for path in self.beside(image):
            if not self._follow_links and escapes_root(path, self._folder):
                raise ValueError(
                    f"{path} is a link out of {str(self._folder)!r}; copy the file, or give --follow_links"
                )
            texts[path] = parse_caption(read_text(path), str(path))
        captions = set(texts.values()) - {""}  # an empty file beside a filled one is no contradiction
        if len(captions) > 1:
            lines = [f"{path}: {text[:80]!r}" for path, text in texts.items()]
            raise ValueError(f"{image} has two captions; remove one of the files:\n{indented_list(lines)}")
        return captions.pop() if captions else ""


def to_nfc(name: str) -> str:
    """A name in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", name)


def _key(path: Path) -> tuple[str, str]:
    """The folder and the name without suffix: equal for an image and its caption files."""
    return str(path.parent), to_nfc(path.stem)
