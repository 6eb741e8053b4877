"""Names in error messages: the nearest known ones, and the first few of many."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def near(wrong: str, known: Iterable[str]) -> str:
    """The end of an error message: what was probably meant, and what there is."""
    known = sorted(known)
    by_lower_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(wrong.lower(), by_lower_case, n=3, cutoff=0.5)
    close = [by_lower_case[name] for name in close]
    meant = f"; did you mean {' or '.join(close)}?" if close else ";"
    return f"{meant} known: {few(known, most=20) or 'none'}"


def few(names: Sequence[str], *, most: int = 8) -> str:
    """The first names with commas, and how many there are when those are not all."""
    shown = ", ".join(names[:most])
    return shown + (f", ... ({len(names)} in all)" if len(names) > most else "")
