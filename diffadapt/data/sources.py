"""Pictures in folders: a .txt file beside each, one metadata.jsonl or metadata.csv, or one folder per class.

Names in metadata lead to files of the data folder only: absolute names, `..` and links out of it are errors.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffadapt.data.examples import Example, folder_examples
from diffadapt.data.images import list_images, listed
from diffadapt.data.links import is_inside
from diffadapt.files import read_text

FILE_COLUMN = "file_name"  # as in the image folders of `datasets`
CAPTION_COLUMNS = ("text", "caption", "prompt")  # tried in this order when no column is named
METADATA = ("metadata.jsonl", "metadata.csv")

Row = dict[str, object]


def captioned_folder(
    folder: str | Path, *, image_column: str | None = None, caption_column: str | None = None
) -> list[Example]:
    """The pictures of a folder, and of the folders in it, with their captions.

    Captions come from metadata.jsonl or metadata.csv (columns `image_column` and `caption_column`), else from
    a .txt file beside each picture.
    Raises: FileNotFoundError or ValueError that lists pictures without caption, captions without picture, or
        the columns there are.
    """
    pictures = list_images(folder, recursive=True)
    captions = _captions(Path(folder), pictures, image_column, caption_column)
    missing = [str(path) for path in pictures if not captions.get(path.resolve())]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(pictures)} pictures have no caption; write it into {METADATA[0]} as "
            f'{{"file_name": ..., "text": ...}}, or into a .txt file beside the picture:\n{listed(missing)}'
        )
    return [Example(path, captions[path.resolve()]) for path in pictures]


def instance_folder(folder: str | Path, prompt: str) -> list[Example]:
    """The pictures of a folder with their captions, as in `captioned_folder`; those without with `prompt`."""
    pictures = list_images(folder)
    captions = _captions(Path(folder), pictures)
    return [Example(path, captions.get(path.resolve()) or prompt) for path in pictures]


def _captions(
    folder: Path,
    pictures: Sequence[Path],
    image_column: str | None = None,
    caption_column: str | None = None,
) -> dict[Path, str]:
    """Picture -> caption from the folder's metadata, else from text files; empty or not there without one."""
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is not None:
        return _metadata_captions(metadata, image_column or FILE_COLUMN, caption_column)
    if image_column or caption_column:
        raise ValueError(f"no {' or '.join(METADATA)} in {str(folder)!r}, so there are no columns to choose")
    return {path.resolve(): _text_beside(path) for path in pictures}


def class_folders(folder: str | Path) -> tuple[list[Example], list[str]]:
    """Pictures in one folder per class. Returns: examples with the number of their class, and the names.

    Raises: FileNotFoundError or ValueError for no folder, no class folders, or an empty one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give the folder that holds one folder per class")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not names:
        raise ValueError(f"no class folders in {str(folder)!r}; expected one folder of pictures per class")
    outside = [str(folder / name) for name in names if not is_inside(folder / name, folder)]
    if outside:
        raise ValueError(f"links out of {str(folder)!r}; copy the folders instead:\n{listed(outside)}")
    if all(name.isdigit() for name in names):
        names.sort(key=int)  # 2 before 10
    parts = [folder_examples(folder / name, label) for label, name in enumerate(names)]
    return [example for part in parts for example in part], names


def choose_caption_column(columns: Sequence[str], wanted: str | None, place: object) -> str:
    """The column of captions: the one that is wanted, or the first usual name.

    Raises: ValueError that lists the columns.
    """
    candidates = CAPTION_COLUMNS if wanted is None else (wanted,)
    found = next((name for name in candidates if name in columns), None)
    if found is None:
        tried = " or ".join(repr(name) for name in candidates)
        raise ValueError(f"{place} has no column {tried}; --caption_column is one of: {', '.join(columns)}")
    return found


def _text_beside(path: Path) -> str:
    """The words of picture.txt beside picture.png; empty where there is none."""
    file = path.with_suffix(".txt")
    if not file.is_file() or not is_inside(file, path.parent):
        return ""
    return " ".join(read_text(file).split())


def captions_of_file(path: Path) -> dict[str, str]:
    """Name of an image -> caption, from the columns file_name and text (caption, prompt) of a .jsonl or .csv.

    Raises: ValueError for other columns, naming those there are.
    """
    captions = {}
    for number, row in _rows(path):
        if FILE_COLUMN not in row:
            columns = ", ".join(map(str, row))
            raise ValueError(f"line {number} of {path} has no column {FILE_COLUMN!r}, only {columns}")
        column = choose_caption_column([str(name) for name in row], None, path)
        captions[str(row[FILE_COLUMN])] = " ".join(str(row[column] or "").split())
    return captions


def _metadata_captions(metadata: Path, image_column: str, caption_column: str | None) -> dict[Path, str]:
    """Picture -> caption, from every row of the file."""
    captions, problems = {}, []
    for number, row in _rows(metadata):
        if image_column not in row:
            columns = ", ".join(map(str, row))
            raise ValueError(
                f"{metadata} has no column {image_column!r}; --image_column is one of: {columns}"
            )
        column = choose_caption_column([str(name) for name in row], caption_column, metadata)
        name = str(row[image_column])
        path = metadata.parent / name
        if Path(name).is_absolute() or not is_inside(path, metadata.parent):
            problems.append(f"line {number}: {name} is outside of the folder")
        elif not path.is_file():
            problems.append(f"line {number}: there is no {name}")
        captions[path.resolve()] = " ".join(str(row[column] or "").split())
    if problems:
        raise ValueError(f"{metadata} names pictures that cannot be used:\n{listed(problems)}")
    return captions


def _rows(metadata: Path) -> Iterator[tuple[int, Row]]:
    """Line number and columns of every row."""
    text = read_text(metadata)
    if metadata.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            yield from ((reader.line_num, {str(name): cell for name, cell in row.items()}) for row in reader)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of {metadata} is not CSV: {error}") from None
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {metadata} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'line {number} of {metadata} is not of the form {{"column": value, ...}}')
        yield number, row
