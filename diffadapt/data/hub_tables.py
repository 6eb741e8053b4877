"""Examples from the `datasets` library: a name on the hub, a folder it reads, or a saved data set.

Image files are taken as they are stored, and opened by `common/images.py`. Nothing but the data set itself is
downloaded: cells that hold an address, or a path out of the data set, are errors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from huggingface_hub.constants import HF_HUB_CACHE

from diffadapt.common.images import StoredImage
from diffadapt.common.messages import notify, shorten_list
from diffadapt.common.symlinks import is_inside, link_root
from diffadapt.data.captions import choose_caption_column, parse_caption
from diffadapt.data.examples import Example
from diffadapt.data.stream import Stream

SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")  # in the folders of save_to_disk
IMAGE_COLUMN = "image"
LABEL_COLUMN = "label"
CAPTION_TYPES = ("string", "large_string", "null")
# Types of columns, besides Image, whose cells may be paths or contents of image files.
IMAGE_FILE_TYPES = ("string", "large_string", "binary", "large_binary")
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")  # of tables whose cells may name files beside them

Table = Dataset | IterableDataset


def open_table(
    name: str, *, config_name: str | None = None, split: str = "train", is_streaming: bool = False
) -> Table:
    """Opens a split of a data set: one saved with `save_to_disk`, or what `load_dataset` finds.

    Args:
        name: a folder, or the name of a data set on the hub.
        config_name: the configuration of the data set.
        split: the name of the split.
        is_streaming: read row by row instead of downloading all of it.

    Raises:
        OSError: there is no data set of that name.
        ValueError: there is no such split; the message lists the splits.
    """
    if any((Path(name) / file).is_file() for file in SAVED_DATASET_FILES):
        # load_dataset does not read what save_to_disk wrote
        table = datasets.load_from_disk(name)
    else:
        table = datasets.load_dataset(name, config_name, streaming=is_streaming)
    if isinstance(table, DatasetDict | IterableDatasetDict):
        if split not in table:
            raise ValueError(f"{name!r} has no split {split!r}, but: {', '.join(table)}")
        table = table[split]
    return table


@dataclass(frozen=True)
class TableImage:
    """An image file in a cell of a data set; equal to another one of the same cell.

    Attributes:
        table: the data set.
        row: the row of the cell.
        column: the column of the cell.
        name: the name of the data set.
    """

    table: Dataset
    row: int
    column: str
    name: str

    def read_bytes(self) -> bytes:
        """The content of the image file."""
        return _read_image_file(self.table[self.row][self.column], str(self), self.name)

    def __str__(self) -> str:
        return f"row {self.row} of {self.name}"


class TableExamples(Sequence[Example]):
    """The rows of a data set as examples, read when they are used.

    Args:
        table: the data set.
        image_column: the column of images.
        caption_column: the column of captions.
        name: the name of the data set.
    """

    def __init__(self, table: Dataset, *, image_column: str, caption_column: str, name: str):
        # Two views of the table, so that reading a caption does not read the image.
        self._images = _as_image_files(table, image_column)
        self._captions = table.select_columns([caption_column])
        self._image_column = image_column
        self._caption_column = caption_column
        self._name = name

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, row: int) -> Example:
        image = TableImage(self._images, row, self._image_column, self._name)
        caption = parse_caption(self._captions[row][self._caption_column], str(image))
        return Example(image, caption)


def read_captioned_table(
    table: Table,
    *,
    name: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    seed: int = 0,
    buffer: int = 1000,
) -> TableExamples | Stream:
    """Reads images and captions from a data set.

    Args:
        table: the data set.
        name: its name, for messages and to find its files.
        image_column: the column of images; None to find it by its type.
        caption_column: the column of captions; None for text, caption or prompt.
        seed: the seed for the order of a stream's shards and blocks.
        buffer: the number of samples that a stream holds and shuffles together.

    Returns:
        The examples; a stream if the table is read row by row.

    Raises:
        ValueError: a column does not exist or has another type; the message lists the columns.
    """
    image_column, columns = _choose_image_column(table, image_column, name)
    caption_column = choose_caption_column(columns, caption_column, name)
    _check_caption_type(table, caption_column, name)
    if isinstance(table, Dataset):
        return TableExamples(table, image_column=image_column, caption_column=caption_column, name=name)
    files = _as_image_files(table, image_column, caption_column)

    def open_epoch(epoch: int) -> Iterator[Example]:
        # A buffer of one row shuffles the shards only; the stream shuffles rows in blocks.
        # The seed of an epoch is a function of its number, so that the epoch can be opened again.
        shards = files.shuffle(seed=seed + epoch, buffer_size=1) if files.num_shards > 1 else files
        for number, row in enumerate(shards):
            place = f"sample {number} of epoch {epoch} of {name}"
            image = StoredImage(place, _read_image_file(row[image_column], place, name))
            yield Example(image, parse_caption(row[caption_column], place))

    return Stream(open_epoch, seed=seed, buffer=buffer)


def read_labelled_table(
    table: Dataset, *, name: str, image_column: str | None = None, label_column: str | None = None
) -> tuple[list[Example], list[str]]:
    """Reads images and class numbers from a data set.

    Args:
        table: the data set.
        name: its name, for messages and to find its files.
        image_column: the column of images; None to find it by its type.
        label_column: the column of labels; None for "label".

    Returns:
        The examples, and the names of the classes.

    Raises:
        ValueError: a column does not exist, which the message lists, or a label is not a class.
    """
    image_column, columns = _choose_image_column(table, image_column, name)
    label_column = label_column or LABEL_COLUMN
    if label_column not in columns:
        raise ValueError(f"{name} has no column {label_column!r} of labels, but: {', '.join(columns)}")
    labels = list(table[label_column])
    column_type = table.features[label_column]
    if isinstance(column_type, ClassLabel):
        class_names = column_type.names
        class_numbers = _check_numbers(labels, label_column, name)
    else:
        class_names, class_numbers = _number_classes(labels, label_column, name)
    files = _as_image_files(table, image_column)
    examples = []
    for row, number in enumerate(class_numbers):
        examples.append(Example(TableImage(files, row, image_column, name), number))
    return examples, class_names


def _check_numbers(labels: Sequence[object], column: str, name: str) -> list[int]:
    """The labels, which must be class numbers from 0 on.

    Raises:
        ValueError: a label is not; the message names its row.
    """
    for row, label in enumerate(labels):
        if not isinstance(label, int) or label < 0:
            raise ValueError(
                f"row {row} of {name} has the label {repr(label)[:80]}; column {column!r} must hold class "
                "numbers from 0 on, or names; leave out images without a class"
            )
    return list(labels)


def _check_names(labels: Sequence[object], column: str, name: str) -> None:
    """Checks that all labels are names.

    Raises:
        ValueError: a label is not; the message names its row.
    """
    for row, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise ValueError(
                f"row {row} of {name} has the label {label!r}; column {column!r} holds names of classes: "
                "leave out images without one"
            )


def _number_classes(labels: Sequence[object], column: str, name: str) -> tuple[list[str], list[int]]:
    """The names of the classes that occur, and the number of each row's class among them.

    Labels that are numbers keep their order, but not their gaps: 0, 5 and 900 are three classes, not 901.
    """
    if any(isinstance(label, str) for label in labels):
        _check_names(labels, column, name)
        classes = sorted(set(labels))
        if all(label.isdecimal() for label in classes):
            classes.sort(key=int)  # 2 before 10, as for folders
    else:
        classes = sorted(set(_check_numbers(labels, column, name)))
    names = list(map(str, classes))
    number_of = {label: number for number, label in enumerate(classes)}
    if classes != list(range(len(classes))):
        notify(
            f"labels of {name}: {shorten_list(names)} are its classes 0 to {len(names) - 1}, in this order"
        )
    return names, [number_of[label] for label in labels]


def _choose_image_column(table: Table, requested: str | None, name: str) -> tuple[str, list[str]]:
    """The column of images, and all columns.

    Raises:
        ValueError: there is no such column, or it does not hold images.
    """
    features = table.features or next(iter(table))  # a stream without a schema: the first row has the names
    columns = list(features)
    column_types = dict(table.features or {})
    image_columns = []
    for column, column_type in column_types.items():
        if _holds_images(column_type):
            image_columns.append(column)
    column = requested or (image_columns[0] if image_columns else IMAGE_COLUMN)
    if column not in columns:
        raise ValueError(f"{name} has no column {column!r}; --image_column is one of: {', '.join(columns)}")
    column_type = column_types.get(column)
    may_hold_files = getattr(column_type, "dtype", None) in IMAGE_FILE_TYPES
    if column_type is not None and column not in image_columns and not may_hold_files:
        raise ValueError(f"column {column!r} of {name} holds {column_type}, not images; see --image_column")
    return column, columns


def _as_image_files(table: Table, *columns: str) -> Table:
    """The columns, with the first one as image files that are not decoded."""
    # not decoded, since common/images.py knows color profiles and orientation
    return table.select_columns(list(columns)).cast_column(columns[0], datasets.Image(decode=False))


def _read_image_file(cell: object, place: str, name: str) -> bytes:
    """The content of an image file: in the cell, or in a file of the data set that the cell names.

    Args:
        cell: the cell.
        place: the row, for messages.
        name: the name of the data set.

    Raises:
        ValueError: there is no image in the cell, or it names a file out of the data set.
    """
    if not isinstance(cell, dict):
        raise ValueError(f"{place} holds no image")
    if cell.get("bytes") is not None:
        return bytes(cell["bytes"])
    # a table can name any file of the machine, so the path must lead to the data set
    path = Path(str(cell.get("path")))
    # Files of a data set from the hub lie in the caches of datasets and of the hub.
    allowed_folders = [datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
    if Path(name).is_dir():
        allowed_folders = [link_root(name)]
        path = _resolve_path(name, path)
    if not any(is_inside(path, folder) for folder in allowed_folders):
        raise ValueError(
            f"{place} names {path}, which is not a file of this data set; the images must be in its tables "
            "or in its folder"
        )
    if not path.is_file():
        raise ValueError(f"{place} names {path}, which is not there; images in an archive must be unpacked")
    return path.read_bytes()


def _resolve_path(name: str, path: Path) -> Path:
    """A path in a table of a folder, which is relative to the folder, or to the folder of the table."""
    if path.is_absolute():
        return path
    for folder in _table_folders(name):
        if (folder / path).is_file():
            return folder / path
    return path


@lru_cache
def _table_folders(name: str) -> tuple[Path, ...]:
    """The folder `name`, and the folders below it that hold tables."""
    folders = {Path(name): None}  # an ordered set
    for path in sorted(Path(name).rglob("*")):
        if path.suffix in TABLE_SUFFIXES:
            folders[path.parent] = None
    return tuple(folders)


def _check_caption_type(table: Table, column: str, name: str) -> None:
    """Checks the type of the column of captions before any row is read.

    Raises:
        ValueError: the column cannot hold captions.
    """
    column_type = (table.features or {}).get(column)
    if column_type is None:  # a stream without a schema
        return
    is_list = isinstance(column_type, datasets.List | datasets.LargeList)
    item_type = column_type.feature if is_list else column_type
    if not isinstance(item_type, datasets.Value) or item_type.dtype not in CAPTION_TYPES:
        raise ValueError(
            f"column {column!r} of {name} holds {column_type}, not captions; name another with "
            "--caption_column"
        )
    if is_list:
        notify(f"the captions of {name} are lists: the first of each is used")


def _holds_images(column_type: object) -> bool:
    """Whether a column holds images, or bytes and paths of them as pandas and polars store them."""
    if isinstance(column_type, dict):
        return bool(column_type) and set(column_type) <= {"bytes", "path"}
    return isinstance(column_type, datasets.Image)
