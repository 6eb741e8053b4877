"""Captions from metadata.jsonl, .csv or .parquet: read right, or refused with file and line."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from diffadapt.common.atomic_files import read_text, text_lines
from diffadapt.common.messages import indented_list
from diffadapt.common.symlinks import escapes_root
from diffadapt.data.captions import choose_caption_column, parse_caption, to_nfc

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first that is there is read
FILE_COLUMN = "file_name"  # as in the image folders of `datasets`
DELIMITERS = (",", ";", "\t")  # of csv files; the header tells which

Row = dict[str, object]


@dataclass(frozen=True)
class MetadataCaptions:
    """What a metadata file says.

    Attributes:
        captions: image, as a normal path without links followed -> caption; empty where there is none.
        lists: how many cells hold several captions, of which the first is used.
    """

    captions: Mapping[Path, str]
    lists: int


def find_metadata_files(files: Sequence[Path]) -> dict[Path, Path]:
    """Folder -> the metadata file in it that is read."""
    chosen: dict[Path, Path] = {}
    for name in METADATA:
        for path in files:
            if path.name.lower() == name and path.is_file():
                chosen.setdefault(path.parent, path)
    return chosen


def normalize_path(path: Path) -> Path:
    """The absolute path without "." and "..", links not followed: files of one content stay two."""
    return Path(os.path.abspath(path))


def read_metadata_captions(
    metadata: Path,
    files: Sequence[Path],
    *,
    root: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    follow_links: bool = False,
    with_other_columns: bool = False,
) -> MetadataCaptions:
    """The captions of a metadata file.

    Args:
        files: of the folder, to find names that are written in another form of Unicode.
        root: that links must not leave.
        with_other_columns: the usual names will do where the columns asked for are not there.
    Raises: ValueError that names file and line of all that cannot be used.
    """
    if not follow_links and escapes_root(metadata, root):
        raise ValueError(f"{metadata} is a link out of {str(root)!r}; copy the file, or give --follow_links")
    rows, columns = _table(metadata)
    if with_other_columns:
        image_column = image_column if image_column in columns else None
        caption_column = caption_column if caption_column in columns else None
    image_column = image_column or FILE_COLUMN
    if image_column not in columns:
        raise ValueError(
            f"{metadata} has no column {image_column!r}; --image_column is one of: {', '.join(columns)}"
        )
    caption_column = choose_caption_column(columns, caption_column, metadata)
    by_name = {to_nfc(path.relative_to(metadata.parent).as_posix()): path for path in _below(files, metadata)}
    captions: dict[Path, str] = {}
    line_of: dict[Path, int] = {}
    problems: list[str] = []
    lists = 0
    for line, row in rows:
        name, cell = row.get(image_column), row.get(caption_column)
        if not isinstance(name, str) or not name.strip():
            problems.append(f"line {line}: no name of a file in column {image_column!r}")
            continue
        image = _image(name, metadata.parent, by_name)
        problem = _problem_of_name(name, image, metadata.parent, by_name)
        if not problem and not follow_links and escapes_root(image, root):
            problem = f"{name} is outside of the folder; copy the file, or give --follow_links"
        if problem:
            problems.append(f"line {line}: {problem}")
            continue
        try:
            caption = parse_caption(cell, f"line {line}")
        except ValueError as error:
            problems.append(str(error))
            continue
        if captions.get(image, caption) != caption:
            problems.append(f"lines {line_of[image]} and {line} caption {name} differently; keep one of them")
            continue
        lists += isinstance(cell, list | tuple) and len(cell) > 1
        captions[image] = caption
        line_of[image] = line
    if problems:
        raise ValueError(
            f"{metadata} has {len(problems)} rows that cannot be used:\n{indented_list(problems)}"
        )
    return MetadataCaptions(captions, lists)


def read_caption_table(path: Path) -> dict[str, str]:
    """Name of an image -> caption, from the columns file_name and text (caption, prompt) of a table.

    Raises: ValueError for other columns, naming those there are, and for rows that cannot be used.
    """
    rows, columns = _table(path)
    if FILE_COLUMN not in columns:
        raise ValueError(f"{path} has no column {FILE_COLUMN!r}, only {', '.join(columns)}")
    column = choose_caption_column(columns, None, path)
    captions: dict[str, str] = {}
    for line, row in rows:
        name = row.get(FILE_COLUMN)
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"line {line} of {path} has no name of a file in column {FILE_COLUMN!r}")
        caption = parse_caption(row.get(column), f"line {line} of {path}")
        if captions.get(name, caption) != caption:
            raise ValueError(f"line {line} of {path} captions {name} a second time, in other words")
        captions[name] = caption
    return captions


def _below(files: Sequence[Path], metadata: Path) -> list[Path]:
    return [path for path in files if path.is_relative_to(metadata.parent)]


def _image(name: str, folder: Path, by_name: Mapping[str, Path]) -> Path:
    """The file that a name stands for: as it is, or one of the folder's in another form of Unicode, with
    Windows' separators or without spaces around it.
    """
    path = normalize_path(folder / name)
    if os.path.isfile(path):
        return path
    for candidate in (name, name.strip(), PureWindowsPath(name.strip()).as_posix()):
        key = to_nfc(os.path.normpath(candidate))
        if key in by_name:
            return normalize_path(by_name[key])
    return path


def _other_case(name: str, names: Iterable[str]) -> str:
    """Which file differs from a missing one in small and capital letters alone, for a message."""
    similar = [other for other in names if other.casefold() == to_nfc(name).casefold()]
    return f"; did you mean {similar[0]}?" if similar else ""


def _problem_of_name(name: str, image: Path, folder: Path, by_name: Mapping[str, Path]) -> str:
    """Why a name in metadata is no file of the folder; "" where it is one."""
    if "\0" in name:
        return f"{name!r} is no name of a file"
    if Path(name).is_absolute() or PureWindowsPath(name).is_absolute():
        return f"{name} is an absolute name; write it from the folder of the metadata on"
    if not image.is_relative_to(normalize_path(folder)):
        return f"{name} is outside of the folder"
    if not os.path.isfile(image):
        return f"there is no {name[:200]}{_other_case(name, by_name)}"
    if any(part.startswith(".") for part in image.relative_to(normalize_path(folder)).parts):
        return f"{name} is hidden, and hidden files and folders are not read; rename it"
    return ""


def _table(metadata: Path) -> tuple[list[tuple[int, Row]], list[str]]:
    """Line number and columns of every row, and the names of all columns.

    Raises: ValueError for a table without rows.
    """
    rows = list(_rows(metadata))
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    if not rows:
        header = "; the first line of csv names the columns" if metadata.suffix.lower() == ".csv" else ""
        raise ValueError(f"{metadata} has no rows{header}")
    return rows, columns


def _rows(metadata: Path) -> Iterator[tuple[int, Row]]:
    """Line number and columns of every row."""
    kind = metadata.suffix.lower()
    if kind == ".parquet":
        return _parquet_rows(metadata)
    text = read_text(metadata)
    return _csv_rows(metadata, text) if kind == ".csv" else _json_rows(metadata, text)


def _json_rows(metadata: Path, text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text_lines(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_distinct)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {metadata} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'line {number} of {metadata} is not of the form {{"column": value, ...}}')
        yield number, row


def _distinct(pairs: list[tuple[str, object]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a column stands there twice")
    return row


def _csv_rows(metadata: Path, text: str) -> Iterator[tuple[int, Row]]:
    """Rows of a csv file, strictly: a quotation mark or comma too many would move words from row to row."""
    offset = 0
    first, _, rest = text.partition("\n")
    if first.lower().startswith("sep="):  # Excel's line that names the delimiter
        delimiter = first[4:].strip() or "\t"
        text = rest
        offset = 1
    else:
        delimiter = max(DELIMITERS, key=first.count) if "," not in first else ","
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    try:
        columns = [name.strip() for name in next(reader, [])]
        if len(set(columns)) < len(columns):
            raise ValueError(f"{metadata} has a column twice: {', '.join(columns)}")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise ValueError(
                    f"line {reader.line_num + offset} of {metadata} has {len(cells)} fields for "
                    f"{len(columns)} columns; a caption with {delimiter!r} in it must stand in quotes"
                )
            yield reader.line_num + offset, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num + offset} of {metadata} is not CSV: {error}") from None


def _parquet_rows(metadata: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(metadata)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{metadata} is not a parquet file: {error}") from None
    return enumerate(table.to_pylist(), start=1)
