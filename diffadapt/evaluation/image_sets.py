"""Sets of images by name: folders, zips, ADM's npz, `datasets`, and what is shipped with the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffadapt.data.images import EXTENSIONS, StoredImage, list_images
from diffadapt.evaluation.archives import arrays_of, members_of
from diffadapt.evaluation.pictures import ArrayPicture, FilePicture, Picture, to_uint8
from diffadapt.models.names import is_embedded, resolve
from diffadapt.nearest import near

DATASETS = "datasets:"
SAMPLE = "sample.json"  # of `diffadapt sample`
SAVED_DATASET = ("state.json", "dataset_dict.json")  # marks of datasets' save_to_disk


@dataclass(frozen=True)
class ImageSet:
    """Images to score, in a fixed order, not yet read.

    Attributes:
        source: as it was named; kind: folder, zip, npz, datasets, embedded, adapter or base.
        ignored: files beside the images that are none, "name: reason".
        made: of drawn images, how; prompts: of drawn images, the caption of each.
    """

    source: str
    kind: str
    pictures: Sequence[Picture]
    ignored: tuple[str, ...] = ()
    made: Mapping[str, object] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)


def open_set(source: str, *, download: bool = False) -> ImageSet:
    """The images a name stands for.

    Args:
        source: a folder (with the folders in it), FILE.zip, FILE.npz with images, FILE.parquet, a folder
            that `datasets` saved, `datasets:NAME[:SPLIT[:COLUMN]]`, or `embedded:NAME[:SPLIT]`.
        download: whether a named data set may be fetched.
    Raises: FileNotFoundError where nothing is, ValueError for other files and empty sets.
    """
    if source.startswith(DATASETS):
        return _named_dataset(source, download)
    path = _path_of(source)
    if path.is_dir():
        if any((path / mark).exists() for mark in SAVED_DATASET):
            import datasets

            return _from_dataset(source, datasets.load_from_disk(str(path)), None)
        return _from_folder(source, path)
    if not path.exists():
        raise FileNotFoundError(f"no images at {source!r}; give a folder, a .zip, a .npz or {DATASETS}NAME")
    if path.suffix == ".zip":
        pictures = [FilePicture(member.name, member) for member in members_of(path)]
        return _checked(ImageSet(source, "zip", pictures))
    if path.suffix == ".npz":
        return _from_npz(source, path)
    if path.suffix == ".parquet":
        import datasets

        return _from_dataset(source, datasets.Dataset.from_parquet(str(path)), None)
    raise ValueError(f"{source!r} is no set of images; give a folder, a .zip, a .npz or {DATASETS}NAME")


def _path_of(source: str) -> Path:
    """Where a set lies; `embedded:NAME:SPLIT` is a table of a data set shipped with the package."""
    if is_embedded(source) and source.count(":") == 2:
        name, _, split = source.rpartition(":")
        tables = sorted(Path(resolve(name)).glob("*.parquet"))
        if split not in [table.stem for table in tables]:
            raise ValueError(f"{name} has no split {split!r}{near(split, [table.stem for table in tables])}")
        return Path(resolve(name)) / f"{split}.parquet"
    return Path(resolve(source))


def has_prompts(source: str) -> bool:
    """Whether a set knows the prompts of its images: a folder that `diffadapt sample` wrote."""
    return (Path(source) / SAMPLE).is_file()


def fingerprint(digests: Iterable[str]) -> str:
    """SHA-256 over the sorted hashes of a set's images: names and order do not matter."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def _from_sample(source: str, folder: Path) -> ImageSet:
    """What `diffadapt sample` left: its images with their prompts, not the sheet of them all."""
    try:
        images = json.loads((folder / SAMPLE).read_text(encoding="utf-8"))["images"]
        names, prompts = [image["file"] for image in images], tuple(image["prompt"] for image in images)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / SAMPLE} is damaged: {error}; remove it to score all images") from None
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{folder / SAMPLE} names {outside[0]!r}, which is not in its folder")
    return _checked(
        ImageSet(source, "folder", [FilePicture(name, folder / name) for name in names], prompts=prompts)
    )


def _from_folder(source: str, folder: Path) -> ImageSet:
    if (folder / SAMPLE).is_file():
        return _from_sample(source, folder)
    pictures = [
        FilePicture(path.relative_to(folder).as_posix(), path) for path in list_images(folder, recursive=True)
    ]
    others = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix.lower() not in EXTENSIONS)
    ignored = tuple(f"{p.relative_to(folder).as_posix()}: not an image file" for p in others)
    return ImageSet(source, "embedded" if is_embedded(source) else "folder", pictures, ignored)


def _from_npz(source: str, path: Path) -> ImageSet:
    arrays = arrays_of(path)
    if "arr_0" not in arrays:
        raise ValueError(
            f"{source} holds {', '.join(arrays) or 'nothing'}, no images under 'arr_0' as ADM's files do"
        )
    values = to_uint8(arrays["arr_0"], source)
    pictures = [ArrayPicture(f"{index:06d}", image) for index, image in enumerate(values)]
    return _checked(ImageSet(source, "npz", pictures))


def _named_dataset(source: str, download: bool) -> ImageSet:
    import datasets

    name, _, rest = source.removeprefix(DATASETS).partition(":")
    split, _, column = rest.partition(":")
    if Path(name).is_dir() and any((Path(name) / mark).exists() for mark in SAVED_DATASET):
        loaded = datasets.load_from_disk(name)
        loaded = loaded[split] if split else loaded
    else:
        config = datasets.DownloadConfig(local_files_only=not download)
        loaded = datasets.load_dataset(name, split=split or "train", download_config=config)
    return _from_dataset(source, loaded, column or None)


def _from_dataset(source: str, dataset: object, column: str | None) -> ImageSet:
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"{source} has splits {', '.join(dataset)}; name one: {DATASETS}FOLDER:SPLIT")
    images = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    column = column or (images[0] if images else "")
    if column not in images:
        raise ValueError(f"{source} has no image column {column!r}{near(column, images)}")
    stored = dataset.cast_column(column, datasets.Image(decode=False))
    return _checked(ImageSet(source, "datasets", _Rows(stored, column)))


@dataclass(frozen=True)
class _Rows(Sequence):
    """The rows of a data set as pictures, read when they are needed."""

    dataset: object
    column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | slice) -> Picture | list[Picture]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.dataset[index][self.column]
        name = f"{index:06d}"
        if row.get("bytes") is not None:
            return FilePicture(name, StoredImage(name, row["bytes"]))
        return FilePicture(name, Path(row["path"]))


def _checked(images: ImageSet) -> ImageSet:
    if not len(images):
        raise ValueError(f"no images in {images.source!r}")
    return images


def as_set(values: np.ndarray, *, source: str, **facts: object) -> ImageSet:
    """A set from images in memory, (N, H, W, 3) uint8 or floats in [0, 1]."""
    pictures = [ArrayPicture(f"{index:06d}", image) for index, image in enumerate(to_uint8(values, source))]
    return _checked(ImageSet(source, "memory", pictures, **facts))
