"""Files that an evaluation writes: tried before the work, the scores first, what is made of them after."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffadapt.files import check_writable

BESIDE = (".md", ".csv", ".html")  # endings of what stands beside the JSON


@dataclass(frozen=True)
class OutputFiles:
    """The record, the table, the rows of images and the page of one evaluation."""

    json: Path
    markdown: Path
    csv: Path
    page: Path

    @classmethod
    def of(cls, output: str | Path) -> OutputFiles:
        """The files beside the JSON file `output`.

        Raises: ValueError for a folder, and for the name of one of the files beside it.
        """
        path = Path(output)
        if str(output).endswith("/") or path.name in ("", ".."):
            raise ValueError(
                f"--output {str(output)!r} is a folder; give a file in it, such as {path}/scores.json"
            )
        if path.suffix in BESIDE:
            raise ValueError(
                f"--output names the JSON file, the others stand beside it: {path.with_suffix('.json')}, "
                f"not {path}"
            )
        stem = path.name.removesuffix(".json")
        return cls(path, *(path.with_name(stem + ending) for ending in BESIDE))

    def check(self) -> None:
        """Raises: ValueError or OSError where one of the files cannot be written."""
        for path in (self.json, self.markdown, self.csv, self.page):
            check_writable(path)


def report(problems: Sequence[str]) -> int:
    """Names what could not be computed or made. Returns the exit code: 1 where there is anything, else 0."""
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(problems))
