"""Text of messages to the user: suggestions for misspelled names, shortened lists, notices."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence

from tqdm import tqdm


def did_you_mean(name: str, valid_names: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest valid names, and the list of all.

    Args:
        name: the name that is not valid.
        valid_names: the names that are.
    """
    valid_names = sorted(valid_names)
    by_lower_case = {valid.lower(): valid for valid in valid_names}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=3, cutoff=0.5)
    suggestion = ";"
    if matches:
        closest_names = [by_lower_case[match] for match in matches]
        suggestion = f"; did you mean {' or '.join(closest_names)}?"
    return f"{suggestion} known: {shorten_list(valid_names, limit=20) or 'none'}"


def shorten_list(names: Sequence[str], *, limit: int = 8) -> str:
    """The first `limit` names, separated by commas, and the total if there are more."""
    text = ", ".join(names[:limit])
    if len(names) > limit:
        text += f", ... ({len(names)} in all)"
    return text


def indented_list(items: Sequence[object], *, limit: int = 20) -> str:
    """The first `limit` items, each indented on a line of its own, and how many more there are."""
    lines = [f"  {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join(lines)


def notify(text: str) -> None:
    """Prints a notice without disturbing progress bars; of several processes only the first one prints."""
    # the launcher's variable, as accelerate's state may not exist yet
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)
