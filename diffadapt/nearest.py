"""The nearest known names, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(wrong: str, known: Iterable[str]) -> str:
    """The end of an error message: what was probably meant, and what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(wrong, known, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(close)}?" if close else ";"
    shown = ", ".join(known[:20]) + (f", ... ({len(known)} in all)" if len(known) > 20 else "")
    return f"{meant} known: {shown or 'none'}"
