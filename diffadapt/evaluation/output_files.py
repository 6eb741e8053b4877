"""Files that an evaluation writes: tried before the work, the scores first, what is made of them after."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffadapt.common.atomic_files import check_writable
from diffadapt.evaluation.record import read_record

JSON = ".json"
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

        Raises: ValueError for a folder, and for a name that does not end in .json: it may be an image's.
        """
        path = Path(output)
        if str(output).endswith("/") or path.name in ("", "..") or path.is_dir():
            raise ValueError(
                f"--output {str(output)!r} is a folder; give a file in it, such as {path}/scores.json"
            )
        if path.suffix != JSON:
            suggestion = path.with_suffix(JSON) if path.suffix in BESIDE else f"{path}{JSON}"
            raise ValueError(
                f"--output names the JSON file, the others stand beside it: {suggestion}, not {path}"
            )
        stem = path.name.removesuffix(JSON)
        return cls(path, *(path.with_name(stem + ending) for ending in BESIDE))

    def check(self) -> None:
        """Whether all files can be written, and replace nothing but those of an earlier evaluation.

        Raises: ValueError or OSError naming the file.
        """
        places = (self.json, self.markdown, self.csv, self.page)
        for path in places:
            check_writable(path)
        present = [path for path in places if path.exists()]
        if present and not self._has_record():
            raise ValueError(
                f"--output would replace {present[0]}, which is not of an earlier evaluation; "
                "give another name"
            )

    def _has_record(self) -> bool:
        try:
            read_record(self.json)
        except (ValueError, OSError):
            return False
        return True


def report(problems: Sequence[str]) -> int:
    """Names what could not be computed or made. Returns the exit code: 1 where there is anything, else 0."""
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(problems))
