"""Lines that tell a person what could not be seen otherwise."""

from __future__ import annotations

import os

from tqdm import tqdm


def notify(text: str) -> None:
    """Print a line, in a run of several processes from the first one only; progress bars stay intact."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text)
