"""Pictures from the `datasets` library: a name on the hub, a folder it reads, or a saved data set.

Picture files are taken as they are stored and opened by `images.open_image`. Nothing but the named data set
is fetched: cells that hold an address, or a path out of the data set, are errors.
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
TEXT_TYPES = ("string", "large_string", "null")
TABLES = (".jsonl", ".json", ".csv", ".parquet")  # whose cells may name files beside them
PICTURE_TYPES = (
    "string",
    "large_string",
    "binary",
    "large_binary",
)  # besides Image: cells that are paths or files

Table = Dataset | IterableDataset


def open_table(
    name: str, *, config_name: str | None = None, split: str = "train", is_streaming: bool = False
) -> Table:
    """The split of a data set: of one saved with `save_to_disk`, else of what `load_dataset` finds.

    Raises: OSError when there is none of that name, ValueError that lists its splits.
    """
    saved = any((Path(name) / file).is_file() for file in SAVED_DATASET_FILES)
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


@dataclass(frozen=True)
class TableImage:
    """A picture file in a cell of a data set; equal to another one of the same table and cell."""

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
        picture = TableImage(self._pictures, row, self._image_column, self._name)
        return Example(picture, parse_caption(self._told[row][self._told_column], str(picture)))


def read_captioned_table(
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
    _check_captions(table, caption_column, name)
    if isinstance(table, Dataset):
        return TableExamples(table, image_column=image_column, told_column=caption_column, name=name)
    files = _as_files(table, image_column, caption_column)

    def open_epoch(epoch: int) -> Iterator[Example]:
        shards = files.shuffle(seed=seed + epoch, buffer_size=1) if files.num_shards > 1 else files
        for number, row in enumerate(shards):
            place = f"sample {number} of epoch {epoch} of {name}"
            image = StoredImage(place, _file_of(row[image_column], place, name))
            yield Example(image, parse_caption(row[caption_column], place))

    return Stream(open_epoch, seed=seed, buffer=buffer)


def read_labelled_table(
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
    kind = table.features[label_column]
    if isinstance(kind, ClassLabel):
        names = kind.names
        numbers = _checked_numbers(labels, label_column, name)
    else:
        names, numbers = _classes(labels, label_column, name)
    files = _as_files(table, image_column)
    sources = [TableImage(files, row, image_column, name) for row in range(len(labels))]
    return [Example(source, number) for source, number in zip(sources, numbers, strict=True)], names


def _checked_numbers(labels: Sequence[object], column: str, name: str) -> list[int]:
    """Class numbers from 0 on. Raises: ValueError that names the first row with another label."""
    for row, label in enumerate(labels):
        if not isinstance(label, int) or label < 0:
            raise ValueError(
                f"row {row} of {name} has the label {repr(label)[:80]}; column {column!r} must hold class "
                "numbers from 0 on, or names; leave out images without a class"
            )
    return list(labels)


def _check_names(labels: Sequence[object], column: str, name: str) -> None:
    """Raises: ValueError that names the first row whose label is no name."""
    for row, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise ValueError(
                f"row {row} of {name} has the label {label!r}; column {column!r} holds names of classes: "
                "leave out images without one"
            )


def _classes(labels: Sequence[object], column: str, name: str) -> tuple[list[str], list[int]]:
    """Names of the classes that occur and each row's number among them.

    Labels that are numbers keep their order: 0, 5 and 900 are three classes, not 901.
    """
    if any(isinstance(label, str) for label in labels):
        _check_names(labels, column, name)
        distinct = sorted(set(labels))
        if all(label.isdecimal() for label in distinct):
            distinct.sort(key=int)  # 2 before 10, as of folders
    else:
        distinct = sorted(set(_checked_numbers(labels, column, name)))
    names = [str(label) for label in distinct]
    number_of = {label: number for number, label in enumerate(distinct)}
    if distinct != list(range(len(distinct))):
        notify(
            f"labels of {name}: {shorten_list(names)} are its classes 0 to {len(names) - 1}, in this order"
        )
    return names, [number_of[label] for label in labels]


def _image_column(table: Table, wanted: str | None, name: str) -> tuple[str, list[str]]:
    """The column of pictures, and all columns."""
    features = table.features or next(iter(table))  # streams without a schema: the first row knows the names
    columns = list(features)
    kinds = dict(table.features or {})
    pictures = [column for column, kind in kinds.items() if _holds_images(kind)]
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
    path = Path(str(cell.get("path")))
    homes = [datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
    if Path(name).is_dir():
        homes = [link_root(name)]
        path = _below(name, path)
    if not any(is_inside(path, home) for home in homes):
        raise ValueError(
            f"{place} names {path}, which is not a file of this data set; the pictures must be in its tables "
            "or in its folder"
        )
    if not path.is_file():
        raise ValueError(f"{place} names {path}, which is not there; images in an archive must be unpacked")
    return path.read_bytes()


def _below(name: str, path: Path) -> Path:
    """A path as a folder's tables mean it: from the folder itself, or from the one a table lies in."""
    if path.is_absolute():
        return path
    for place in _table_folders(name):
        if (place / path).is_file():
            return place / path
    return path


@lru_cache
def _table_folders(name: str) -> tuple[Path, ...]:
    """A folder, and the folders in it that hold tables."""
    tables = [path for path in sorted(Path(name).rglob("*")) if path.suffix in TABLES]
    return tuple(dict.fromkeys([Path(name), *(path.parent for path in tables)]))


def _check_captions(table: Table, column: str, name: str) -> None:
    """Raises: ValueError for a column that cannot hold captions, before any row is read."""
    kind = (table.features or {}).get(column)
    if kind is None:  # a stream without a schema
        return
    is_list = isinstance(kind, datasets.List | datasets.LargeList)
    item = kind.feature if is_list else kind
    if not isinstance(item, datasets.Value) or item.dtype not in TEXT_TYPES:
        raise ValueError(
            f"column {column!r} of {name} holds {kind}, not captions; name another with --caption_column"
        )
    if is_list:
        notify(f"the captions of {name} are lists: the first of each is used")


def _holds_images(kind: object) -> bool:
    """Whether a column is of images, or of their bytes and paths as pandas and polars store them."""
    if isinstance(kind, dict):
        return bool(kind) and set(kind) <= {"bytes", "path"}
    return isinstance(kind, datasets.Image)
