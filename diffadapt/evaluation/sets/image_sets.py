"""Sets of images by name: folders, zips, ADM's npz, `datasets`, and what is shipped with the package."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from diffadapt.common.images import IMAGE_SUFFIXES, StoredImage, list_images
from diffadapt.common.messages import did_you_mean
from diffadapt.common.symlinks import visible_files
from diffadapt.evaluation.sets.archives import IMAGES, arrays_of, members_of
from diffadapt.evaluation.sets.image_files import ArrayPicture, FilePicture, Picture, to_uint8
from diffadapt.models.base_names import is_embedded, resolve

DATASETS = "datasets:"
SAMPLE = "sample.json"  # of `diffadapt sample`
OVERVIEW = re.compile(r"(image|sample|samples)?[-_ ]?(grid|sheet|overview|collage)([-_ ]?\d+)?")
INPUTS = ("input", "inputs", "source", "conditioning")  # folders of what an image was made from
SAVED_DATASET = ("state.json", "dataset_dict.json")  # marks of datasets' save_to_disk


@dataclass(frozen=True)
class ImageSet:
    """Images to score, in a fixed order, not yet read.

    Attributes:
        source: as it was named; kind: folder, zip, npz, datasets, embedded, adapter or base.
        ignored: files beside the images that are none, "name: reason".
        no_samples: images that are left out because their names say that they are an overview or an input.
        made: of drawn images, how; prompts: of drawn images, the caption of each.
    """

    source: str
    kind: str
    pictures: Sequence[Picture]
    ignored: tuple[str, ...] = ()
    made: Mapping[str, object] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    no_samples: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)


def open_set(source: str, *, download: bool = False, follow_links: bool = False) -> ImageSet:
    """The images a name stands for.

    Args:
        source: a folder (with the folders in it), FILE.zip, FILE.npz or FILE.npy with images, FILE.parquet, a
            folder that `datasets` saved, `datasets:NAME[:SPLIT[:COLUMN]]`, or `embedded:NAME[:SPLIT]`.
        download: whether a named data set may be fetched.
        follow_links: follow links out of a folder too.
    Raises: FileNotFoundError where nothing is, ValueError for other files and empty sets.
    """
    if source.startswith(DATASETS):
        return _named_dataset(source, download)
    path = _path_of(source)
    if path.is_dir():
        if any((path / mark).exists() for mark in SAVED_DATASET):
            import datasets

            return _from_dataset(source, datasets.load_from_disk(str(path)), None)
        return _from_folder(source, path, follow_links)
    if not path.exists():
        raise FileNotFoundError(f"no images at {source!r}; give a folder, a .zip, a .npz or {DATASETS}NAME")
    if path.suffix == ".zip":
        pictures = [FilePicture(member.name, member) for member in members_of(path)]
        return _checked(ImageSet(source, "zip", pictures))
    if path.suffix == ".npz":
        return _from_npz(source, path)
    if path.suffix == ".npy":
        return _from_npy(source, path)
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
            raise ValueError(
                f"{name} has no split {split!r}{did_you_mean(split, [table.stem for table in tables])}"
            )
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


def _from_folder(source: str, folder: Path, follow_links: bool) -> ImageSet:
    if (folder / SAMPLE).is_file():
        return _from_sample(source, folder)
    _refuse_results(folder)
    paths = list_images(folder, recursive=True, follow_links=follow_links)
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    no_samples = [name for name in names if _is_no_sample(name)]
    if len(no_samples) == len(names):
        no_samples = []
    pictures = [FilePicture(name, path) for name, path in names.items() if name not in no_samples]
    files, _ = visible_files(folder, recursive=True, follow_links=follow_links)
    others = [
        path.relative_to(folder).as_posix() for path in files if path.suffix.lower() not in IMAGE_SUFFIXES
    ]
    ignored = tuple(f"{name}: not an image file" for name in others)
    kind = "embedded" if is_embedded(source) else "folder"
    return ImageSet(source, kind, pictures, ignored, no_samples=tuple(no_samples))


def _is_no_sample(name: str) -> bool:
    """Whether a file is, by its name, an overview of samples or an input of what made them."""
    path = PurePosixPath(name)
    is_input = any(part.lower() in INPUTS for part in path.parts[:-1])
    return is_input or OVERVIEW.fullmatch(path.stem.lower()) is not None


def _refuse_results(folder: Path) -> None:
    """Raises: ValueError for the folder of a training run or an evaluation, which holds several sets."""
    if (folder / "run.json").is_file() and (folder / "samples").is_dir():
        raise ValueError(
            f"{str(folder)!r} is the folder of a training run, with images of before and after; score its "
            f"checkpoints with --run {shlex.quote(str(folder))}, or name {folder / 'samples' / 'after'}"
        )
    if (folder / "subject.json").is_file() and (folder / "images").is_dir():
        folders = [str(path) for path in sorted((folder / "images").iterdir()) if path.is_dir()]
        sets = ", ".join(folders)
        raise ValueError(f"{str(folder)!r} holds the images of an evaluation; name a set of them: {sets}")


def _from_npz(source: str, path: Path) -> ImageSet:
    arrays = arrays_of(path)
    images = {name: array for name, array in arrays.items() if array.ndim == 4}
    if IMAGES in arrays:
        images = {IMAGES: arrays[IMAGES]}
    if len(images) != 1:
        held = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise ValueError(
            f"{source} holds {held}; expected images (N, H, W, 3) under {IMAGES!r}, or one array of four axes"
        )
    return _of_array(source, "npz", *images.values())


def _from_npy(source: str, path: Path) -> ImageSet:
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{source} cannot be read as an array: {error}") from None
    return _of_array(source, "npy", values)


def _of_array(source: str, kind: str, values: np.ndarray) -> ImageSet:
    """Images (N, H, W, C), or (N, C, H, W) where only that can be meant."""
    is_channels_first = values.ndim == 4 and values.shape[1] in (1, 3) and values.shape[3] not in (1, 3)
    values = to_uint8(values.transpose(0, 2, 3, 1) if is_channels_first else values, source)
    pictures = [ArrayPicture(f"{index:06d}", image) for index, image in enumerate(values)]
    return _checked(ImageSet(source, kind, pictures))


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
        raise ValueError(f"{source} has no image column {column!r}{did_you_mean(column, images)}")
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
