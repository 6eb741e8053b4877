"""The files that an evaluation writes: checked before the work, the scores written first, the page last."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffadapt.common.atomic_files import check_writable, write_utf8
from diffadapt.evaluation.record import EvaluationRecord, read_record
from diffadapt.evaluation.report.page import write_page
from diffadapt.evaluation.report.tables import per_image_csv, report

JSON = ".json"
SUFFIXES_BESIDE = (".md", ".csv", ".html")  # of the files beside the JSON


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

        Raises:
            ValueError: it is a folder, or a name that does not end in .json: that may be an image.
        """
        path = Path(output)
        if str(output).endswith("/") or path.name in ("", "..") or path.is_dir():
            raise ValueError(
                f"--output {str(output)!r} is a folder; give a file in it, such as {path}/scores.json"
            )
        if path.suffix != JSON:
            suggestion = path.with_suffix(JSON) if path.suffix in SUFFIXES_BESIDE else f"{path}{JSON}"
            raise ValueError(
                f"--output names the JSON file, the others stand beside it: {suggestion}, not {path}"
            )
        stem = path.name.removesuffix(JSON)
        return cls(path, *(path.with_name(stem + suffix) for suffix in SUFFIXES_BESIDE))

    def check(self) -> None:
        """Checks that all files can be written, and replace nothing but those of an earlier evaluation.

        Raises:
            ValueError, OSError: a file cannot be written or must not be replaced; names the file.
        """
        paths = (self.json, self.markdown, self.csv, self.page)
        for path in paths:
            check_writable(path)
        existing = [path for path in paths if path.exists()]
        if existing and not self._has_record():
            raise ValueError(
                f"--output would replace {existing[0]}, which is not of an earlier evaluation; "
                "give another name"
            )

    def _has_record(self) -> bool:
        try:
            read_record(self.json)
        except (ValueError, OSError):
            return False
        return True


@dataclass(frozen=True)
class EvaluationOutput:
    """The scores of an evaluation, and the images that its page shows.

    Attributes:
        record: the scores.
        load_image: (label of a set, image name) -> the image, of the images that the record names.
        failures: what should have been computed and was not, "what: why".
    """

    record: EvaluationRecord
    load_image: Callable[[str, str], Image.Image]
    failures: tuple[str, ...] = ()

    def write(self, files: OutputFiles) -> list[str]:
        """Writes the scores first, the page last. Returns what could not be computed or written."""
        self.record.write(files.json)  # from which all others can be made again
        write_utf8(files.markdown, report(self.record))
        write_utf8(files.csv, per_image_csv(self.record))
        return [*self.failures, *write_page(self.record, files.page, self.load_image)]


def report_problems(problems: Sequence[str]) -> int:
    """Prints what could not be computed or written. Returns the exit code: 1 if there is anything, else 0."""
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(problems))
