"""Pictures from the `datasets` library: a name on the hub, a folder it reads, or a saved data set.

Picture files are taken as they are stored and opened by `images.open_image`. Nothing but the named data set
is fetched: cells that hold an address, or a path out of the data set, are errors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from huggingface_hub.constants import HF_HUB_CACHE

from diffadapt.data.examples import Example
from diffadapt.data.images import StoredImage
from diffadapt.data.links import is_inside
from diffadapt.data.sources import choose_caption_column
from diffadapt.data.stream import Stream

SAVED = ("state.json", "dataset_dict.json")  # in the folders of save_to_disk
IMAGE_COLUMN = "image"
LABEL_COLUMN = "label"
PICTURE_TYPES = ("string", "binary")  # besides Image: cells that are paths or files

Table = Dataset | IterableDataset


def open_table(
    name: str, *, config_name: str | None = None, split: str = "train", is_streaming: bool = False
) -> Table:
    """The split of a data set: of one saved with `save_to_disk`, else of what `load_dataset` finds.

    Raises: OSError when there is none of that name, ValueError that lists its splits.
    """
    saved = any((Path(name) / file).is_file() for file in SAVED)
    table = (
        datasets.load_from_disk(name)
        if saved
        else datasets.load_dataset(name, config_name, streaming=is_streaming)
    )
    if isinstance(table, DatasetDict | IterableDatasetDict):
        if split not in table:
            raise ValueError(f"{name!r} has no split {split!r}, but: {', '.join(table)}")
        table = table[split]
    return table


@dataclass(frozen=True, eq=False)
class TablePicture:
    """A picture file in a cell of a data set."""

    table: Dataset
    row: int
    column: str
    name: str  # of the data set

    def read_bytes(self) -> bytes:
        return _file_of(self.table[self.row][self.column], str(self), self.name)

    def __str__(self) -> str:
        return f"row {self.row} of {self.name}"


class TableExamples(Sequence[Example]):
    """The rows of a data set as examples, read when they are asked for."""

    def __init__(self, table: Dataset, *, image_column: str, told_column: str, name: str):
        self._pictures = _as_files(table, image_column)
        self._told = table.select_columns([told_column])
        self._image_column, self._told_column, self._name = image_column, told_column, name

    def __len__(self) -> int:
        return len(self._told)

    def __getitem__(self, row: int) -> Example:
        picture = TablePicture(self._pictures, row, self._image_column, self._name)
        return Example(picture, _caption(self._told[row][self._told_column]))


def captioned_table(
    table: Table,
    *,
    name: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    seed: int = 0,
    buffer: int = 1000,
) -> TableExamples | Stream:
    """Pictures and captions of a data set; of one that is read row by row, a stream.

    Args:
        name: of the data set, for messages and to know where its files lie.
        seed: of the order of a stream's shards and of its blocks.
        buffer: samples a stream holds and shuffles together.
    Raises: ValueError that lists the columns.
    """
    image_column, columns = _image_column(table, image_column, name)
    caption_column = choose_caption_column(columns, caption_column, name)
    if isinstance(table, Dataset):
        return TableExamples(table, image_column=image_column, told_column=caption_column, name=name)
    files = _as_files(table, image_column, caption_column)

    def open_epoch(epoch: int) -> Iterator[Example]:
        shards = files.shuffle(seed=seed + epoch, buffer_size=1) if files.num_shards > 1 else files
        for number, row in enumerate(shards):
            place = f"sample {number} of epoch {epoch} of {name}"
            image = StoredImage(place, _file_of(row[image_column], place, name))
            yield Example(image, _caption(row[caption_column]))

    return Stream(open_epoch, seed=seed, buffer=buffer)


def labelled_table(
    table: Dataset, *, name: str, image_column: str | None = None, label_column: str | None = None
) -> tuple[list[Example], list[str]]:
    """Pictures and class numbers of a data set. Returns: examples, and the names of the classes.

    Raises: ValueError that lists the columns, or for labels that are no class numbers.
    """
    image_column, columns = _image_column(table, image_column, name)
    label_column = label_column or LABEL_COLUMN
    if label_column not in columns:
        raise ValueError(f"{name} has no column {label_column!r} of labels, but: {', '.join(columns)}")
    labels = list(table[label_column])
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise ValueError(f"column {label_column!r} of {name} must hold class numbers from 0 on")
    kind, pictures = table.features[label_column], _as_files(table, image_column)
    names = kind.names if isinstance(kind, ClassLabel) else [str(n) for n in range(max(labels) + 1)]
    sources = [TablePicture(pictures, row, image_column, name) for row in range(len(labels))]
    return [Example(source, label) for source, label in zip(sources, labels, strict=True)], names


def _image_column(table: Table, wanted: str | None, name: str) -> tuple[str, list[str]]:
    """The column of pictures, and all columns."""
    features = table.features or next(iter(table))  # streams without a schema: the first row knows the names
    columns = list(features)
    kinds = dict(table.features or {})
    pictures = [column for column, kind in kinds.items() if isinstance(kind, datasets.Image)]
    chosen = wanted or (pictures[0] if pictures else IMAGE_COLUMN)
    if chosen not in columns:
        listed = ", ".join(columns)
        raise ValueError(f"{name} has no column {chosen!r}; --image_column is one of: {listed}")
    kind = kinds.get(chosen)
    if kind is not None and chosen not in pictures and getattr(kind, "dtype", None) not in PICTURE_TYPES:
        raise ValueError(f"column {chosen!r} of {name} holds {kind}, not pictures; see --image_column")
    return chosen, columns


def _as_files(table: Table, *columns: str) -> Table:
    """The columns, the first one as undecoded picture files."""
    return table.select_columns(list(columns)).cast_column(columns[0], datasets.Image(decode=False))


def _file_of(cell: object, place: str, name: str) -> bytes:
    """The bytes of a picture file: in the cell, or in a file of the data set that the cell names."""
    if not isinstance(cell, dict):
        raise ValueError(f"{place} holds no picture")
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    path, homes = str(cell.get("path")), [datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
    if Path(name).is_dir():
        homes = [name]
    if not any(is_inside(Path(path), home) for home in homes):
        raise ValueError(
            f"{place} names {path}, which is not a file of this data set; the pictures must be in its tables "
            "or in its folder"
        )
    return Path(path).read_bytes()


def _caption(cell: object) -> str:
    """The caption in a cell; of several the first. Empty where there is none."""
    if isinstance(cell, list | tuple):
        cell = next((text for text in cell if text), "")
    return " ".join(str(cell if cell is not None else "").split())
