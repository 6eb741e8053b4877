"""Captions from metadata.jsonl, metadata.csv and metadata.parquet, with errors that name file and line."""

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

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first that exists is read
FILE_COLUMN = "file_name"  # as in the image folders of `datasets`
DELIMITERS = (",", ";", "\t")  # of csv files; the header decides

Row = dict[str, object]


@dataclass(frozen=True)
class MetadataCaptions:
    """The content of a metadata file.

    Attributes:
        captions: image, as an absolute path with links not resolved -> caption; empty if it has none.
        num_lists: the number of cells with several captions, of which the first one is used.
    """

    captions: Mapping[Path, str]
    num_lists: int


def find_metadata_files(files: Sequence[Path]) -> dict[Path, Path]:
    """Folder -> the metadata file in it that is read."""
    metadata: dict[Path, Path] = {}
    for name in METADATA:
        for path in files:
            if path.name.lower() == name and path.is_file():
                metadata.setdefault(path.parent, path)
    return metadata


def normalize_path(path: Path) -> Path:
    """The absolute path without "." and "..".

    Links are not resolved, so that two links to one file stay two images.
    """
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
    """Reads the captions of a metadata file.

    Args:
        metadata: the file.
        files: all files of the folder, to find names that are written in another form of Unicode.
        root: the folder that links must not leave.
        image_column: the column of file names; None for FILE_COLUMN.
        caption_column: the column of captions; None for the first of CAPTION_COLUMNS.
        follow_links: follow links out of the root too.
        with_other_columns: fall back to the default columns if the requested ones do not exist.

    Raises:
        ValueError: the file has other columns, or rows that cannot be used; the message names the file and
            the lines.
    """
    if not follow_links and escapes_root(metadata, root):
        raise ValueError(f"{metadata} is a link out of {str(root)!r}; copy the file, or give --follow_links")
    rows, columns = _read_table(metadata)
    # validation data may have other columns than the training data whose options these are
    if with_other_columns:
        image_column = image_column if image_column in columns else None
        caption_column = caption_column if caption_column in columns else None
    image_column = image_column or FILE_COLUMN
    if image_column not in columns:
        raise ValueError(
            f"{metadata} has no column {image_column!r}; --image_column is one of: {', '.join(columns)}"
        )
    caption_column = choose_caption_column(columns, caption_column, metadata)
    folder = metadata.parent
    path_of_name = _paths_by_name(files, folder)
    # all rows are read before an error is raised, so that one run shows every problem of a file
    captions: dict[Path, str] = {}
    line_of: dict[Path, int] = {}
    problems: list[str] = []
    num_lists = 0
    for line, row in rows:
        name = row.get(image_column)
        if not isinstance(name, str) or not name.strip():
            problems.append(f"line {line}: no file name in column {image_column!r}")
            continue
        image = _resolve_name(name, folder, path_of_name)
        problem = _problem_of_name(name, image, folder, path_of_name)
        if not problem and not follow_links and escapes_root(image, root):
            problem = f"{name} is outside of the folder; copy the file, or give --follow_links"
        if problem:
            problems.append(f"line {line}: {problem}")
            continue
        cell = row.get(caption_column)
        try:
            caption = parse_caption(cell, f"line {line}")
        except ValueError as error:
            problems.append(str(error))
            continue
        if captions.get(image, caption) != caption:
            problems.append(f"lines {line_of[image]} and {line} caption {name} differently; keep one of them")
            continue
        if isinstance(cell, list | tuple) and len(cell) > 1:
            num_lists += 1
        captions[image] = caption
        line_of[image] = line
    if problems:
        raise ValueError(
            f"{metadata} has {len(problems)} rows that cannot be used:\n{indented_list(problems)}"
        )
    return MetadataCaptions(captions, num_lists)


def read_caption_table(path: Path) -> dict[str, str]:
    """Reads file name -> caption from the columns file_name and text (caption, prompt) of a table.

    Raises:
        ValueError: the table has other columns, which the message lists, or a row that cannot be used.
    """
    rows, columns = _read_table(path)
    if FILE_COLUMN not in columns:
        raise ValueError(f"{path} has no column {FILE_COLUMN!r}, only {', '.join(columns)}")
    caption_column = choose_caption_column(columns, None, path)
    captions: dict[str, str] = {}
    for line, row in rows:
        name = row.get(FILE_COLUMN)
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"line {line} of {path} has no file name in column {FILE_COLUMN!r}")
        caption = parse_caption(row.get(caption_column), f"line {line} of {path}")
        if captions.get(name, caption) != caption:
            raise ValueError(f"line {line} of {path} captions {name} a second time, in other words")
        captions[name] = caption
    return captions


def _paths_by_name(files: Sequence[Path], folder: Path) -> dict[str, Path]:
    """Name relative to a folder, in composed form -> path, for all files below the folder."""
    path_of_name = {}
    for path in files:
        if path.is_relative_to(folder):
            path_of_name[to_nfc(path.relative_to(folder).as_posix())] = path
    return path_of_name


def _resolve_name(name: str, folder: Path, path_of_name: Mapping[str, Path]) -> Path:
    """The file that a name in metadata means.

    It is the name as written, or a file of the folder in another form of Unicode, with the separators of
    Windows, or without spaces around it.
    """
    path = normalize_path(folder / name)
    if os.path.isfile(path):
        return path
    for spelling in (name, name.strip(), PureWindowsPath(name.strip()).as_posix()):
        normalized = to_nfc(os.path.normpath(spelling))
        if normalized in path_of_name:
            return normalize_path(path_of_name[normalized])
    return path


def _problem_of_name(name: str, image: Path, folder: Path, path_of_name: Mapping[str, Path]) -> str:
    """Why a name in metadata is not a file of the folder; "" if it is one."""
    if "\0" in name:
        return f"{name!r} is not a file name"
    if Path(name).is_absolute() or PureWindowsPath(name).is_absolute():
        return f"{name} is an absolute name; write it relative to the folder of the metadata"
    if not image.is_relative_to(normalize_path(folder)):
        return f"{name} is outside of the folder"
    if not os.path.isfile(image):
        return f"there is no {name[:200]}{_suggest_other_case(name, path_of_name)}"
    if any(part.startswith(".") for part in image.relative_to(normalize_path(folder)).parts):
        return f"{name} is hidden, and hidden files and folders are not read; rename it"
    return ""


def _suggest_other_case(name: str, existing_names: Iterable[str]) -> str:
    """The end of a message about a missing file: an existing one that differs in upper and lower case."""
    folded = to_nfc(name).casefold()
    for existing in existing_names:
        if existing.casefold() == folded:
            return f"; did you mean {existing}?"
    return ""


def _read_table(metadata: Path) -> tuple[list[tuple[int, Row]], list[str]]:
    """Reads a table.

    Returns:
        (line number, row) of every row, and the names of all columns.

    Raises:
        ValueError: the table has no rows, or cannot be read.
    """
    rows = list(_read_rows(metadata))
    if not rows:
        hint = "; the first line of csv names the columns" if metadata.suffix.lower() == ".csv" else ""
        raise ValueError(f"{metadata} has no rows{hint}")
    columns: dict[str, None] = {}  # an ordered set: rows of JSON may have different columns
    for _, row in rows:
        columns |= dict.fromkeys(row)
    return rows, list(columns)


def _read_rows(metadata: Path) -> Iterator[tuple[int, Row]]:
    """(line number, row) of every row."""
    suffix = metadata.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet_rows(metadata)
    text = read_text(metadata)
    return _read_csv_rows(metadata, text) if suffix == ".csv" else _read_json_rows(metadata, text)


def _read_json_rows(metadata: Path, text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text_lines(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_row_of_pairs)
        except (ValueError, RecursionError) as error:  # the latter for brackets nested thousands deep
            raise ValueError(f"line {number} of {metadata} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'line {number} of {metadata} is not of the form {{"column": value, ...}}')
        yield number, row


def _row_of_pairs(pairs: list[tuple[str, object]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a column occurs twice")
    return row


def _read_csv_rows(metadata: Path, text: str) -> Iterator[tuple[int, Row]]:
    """Reads csv strictly: an extra quotation mark or comma would move text from row to row."""
    line_offset = 0
    first_line, _, remaining_text = text.partition("\n")
    if first_line.lower().startswith("sep="):  # Excel's line that names the delimiter
        delimiter = first_line[4:].strip() or "\t"
        text = remaining_text
        line_offset = 1
    else:
        # a comma in the header decides, since names of columns rarely hold one, and captions often
        delimiter = "," if "," in first_line else max(DELIMITERS, key=first_line.count)
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
            line = reader.line_num + line_offset  # the last line of the row, where a cell has several
            if len(cells) != len(columns):
                raise ValueError(
                    f"line {line} of {metadata} has {len(cells)} fields for {len(columns)} columns; "
                    f"a caption with {delimiter!r} in it must stand in quotes"
                )
            yield line, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        line = reader.line_num + line_offset
        raise ValueError(f"line {line} of {metadata} is not CSV: {error}") from None


def _read_parquet_rows(metadata: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(metadata)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{metadata} is not a parquet file: {error}") from None
    return enumerate(table.to_pylist(), start=1)  # rows count from 1, like lines
