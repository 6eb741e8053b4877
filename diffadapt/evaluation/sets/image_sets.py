"""Sets of images by name: folders, zips, ADM's npz, `datasets`, and the sets shipped with the package."""

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
from diffadapt.evaluation.sets.archives import IMAGES, read_npz, zip_images
from diffadapt.evaluation.sets.image_files import ArrayImage, ImageFile, ImageInfo, LazyImage, to_uint8
from diffadapt.models.base_names import is_embedded, resolve

DATASETS = "datasets:"
SAMPLE = "sample.json"  # written by `diffadapt sample`
# grid.png, samples_sheet-2.png: what training scripts, ours and others', write beside single images
OVERVIEW = re.compile(r"(image|sample|samples)?[-_ ]?(grid|sheet|overview|collage)([-_ ]?\d+)?")
INPUT_FOLDERS = ("input", "inputs", "source", "conditioning")  # of images that others were generated from
SAVED_DATASET = ("state.json", "dataset_dict.json")  # files that datasets' save_to_disk writes


@dataclass(frozen=True)
class ImageSet:
    """Images to score, in a fixed order, not yet read.

    Attributes:
        source: the name it was opened by.
        kind: folder, zip, npz, npy, datasets, embedded, adapter or base.
        images: in the order of their features.
        ignored: files beside the images that are no images, "name: reason".
        generation: of generated images, how they were generated.
        prompts: of generated images, the prompt of each.
        excluded: images left out because their names say that they are an overview or an input.
    """

    source: str
    kind: str
    images: Sequence[LazyImage]
    ignored: tuple[str, ...] = ()
    generation: Mapping[str, object] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> list[str]:
        """The name of each image, in order."""
        return [image.name for image in self.images]


def open_set(source: str, *, download: bool = False, follow_links: bool = False) -> ImageSet:
    """Opens the images that a name stands for.

    Args:
        source: a folder (with the folders in it), FILE.zip, FILE.npz or FILE.npy with images, FILE.parquet, a
            folder that `datasets` saved, `datasets:NAME[:SPLIT[:COLUMN]]`, or `embedded:NAME[:SPLIT]`.
        download: whether a data set of the Hugging Face hub may be downloaded.
        follow_links: follow links out of a folder too.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file is of another kind, or the set is empty.
    """
    if source.startswith(DATASETS):
        return _open_hub_dataset(source, download)
    path = _resolve_path(source)
    if path.is_dir():
        if _is_saved_dataset(path):
            import datasets  # only where it is needed: the import takes seconds

            return _open_dataset(source, datasets.load_from_disk(str(path)), column=None)
        return _open_folder(source, path, follow_links)
    if not path.exists():
        raise FileNotFoundError(f"no images at {source!r}; give a folder, a .zip, a .npz or {DATASETS}NAME")
    if path.suffix == ".zip":
        images = []
        for zip_image in zip_images(path):
            images.append(ImageFile(zip_image.name, zip_image))
        return _require_images(ImageSet(source, "zip", images))
    if path.suffix == ".npz":
        return _open_npz(source, path)
    if path.suffix == ".npy":
        return _open_npy(source, path)
    if path.suffix == ".parquet":
        import datasets

        return _open_dataset(source, datasets.Dataset.from_parquet(str(path)), column=None)
    raise ValueError(f"{source!r} is no set of images; give a folder, a .zip, a .npz or {DATASETS}NAME")


def has_prompts(source: str) -> bool:
    """Whether a set knows the prompts of its images: a folder that `diffadapt sample` wrote."""
    return (Path(source) / SAMPLE).is_file()


def fingerprint(digests: Iterable[str]) -> str:
    """SHA-256 over the sorted hashes of a set's images: names and order do not matter."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def fingerprint_of(infos: Iterable[ImageInfo]) -> str:
    """The `fingerprint` of images that were read."""
    return fingerprint(info.sha256 for info in infos)


def _resolve_path(source: str) -> Path:
    """The path of a set; `embedded:NAME:SPLIT` is a table of a data set shipped with the package."""
    if not (is_embedded(source) and source.count(":") == 2):
        return Path(resolve(source))
    name, _, split = source.rpartition(":")  # "embedded:handwriting:test"
    folder = Path(resolve(name))
    splits = sorted(table.stem for table in folder.glob("*.parquet"))
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}{did_you_mean(split, splits)}")
    return folder / f"{split}.parquet"


def _open_folder(source: str, folder: Path, follow_links: bool) -> ImageSet:
    """The images of a folder and of the folders in it, named by their paths within it."""
    if (folder / SAMPLE).is_file():
        return _open_sample_folder(source, folder)
    _refuse_output_folders(folder)
    paths: dict[str, Path] = {}
    for path in list_images(folder, recursive=True, follow_links=follow_links):
        paths[path.relative_to(folder).as_posix()] = path
    excluded = [name for name in paths if _is_overview_or_input(name)]
    if len(excluded) == len(paths):  # then the names mean something else
        excluded = []
    images = []
    for name, path in paths.items():
        if name not in excluded:
            images.append(ImageFile(name, path))
    ignored = []
    files, _ = visible_files(folder, recursive=True, follow_links=follow_links)
    for path in files:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            ignored.append(f"{path.relative_to(folder).as_posix()}: not an image file")
    kind = "embedded" if is_embedded(source) else "folder"
    return ImageSet(source, kind, images, ignored=tuple(ignored), excluded=tuple(excluded))


def _open_sample_folder(source: str, folder: Path) -> ImageSet:
    """The images that `diffadapt sample` wrote, with their prompts, without the contact sheet."""
    try:
        entries = json.loads((folder / SAMPLE).read_text(encoding="utf-8"))["images"]
        names = [entry["file"] for entry in entries]
        prompts = [entry["prompt"] for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / SAMPLE} is damaged: {error}; remove it to score all images") from None
    for name in names:
        if Path(name).name != name:  # "../../secret.png"
            raise ValueError(f"{folder / SAMPLE} names {name!r}, which is not in its folder")
    images = [ImageFile(name, folder / name) for name in names]
    return _require_images(ImageSet(source, "folder", images, prompts=tuple(prompts)))


def _is_overview_or_input(name: str) -> bool:
    """Whether a file is, by its name, an overview of samples or an input that samples were made from."""
    path = PurePosixPath(name)
    is_input = any(part.lower() in INPUT_FOLDERS for part in path.parts[:-1])
    return is_input or OVERVIEW.fullmatch(path.stem.lower()) is not None


def _refuse_output_folders(folder: Path) -> None:
    """Refuses the output folder of a training run or of an evaluation, which holds several sets."""
    if (folder / "run.json").is_file() and (folder / "samples").is_dir():
        raise ValueError(
            f"{str(folder)!r} is the folder of a training run, with images of before and after; score its "
            f"checkpoints with --run {shlex.quote(str(folder))}, or name {folder / 'samples' / 'after'}"
        )
    if (folder / "subject.json").is_file() and (folder / "images").is_dir():
        sets = [str(path) for path in sorted((folder / "images").iterdir()) if path.is_dir()]
        raise ValueError(
            f"{str(folder)!r} holds the images of an evaluation; name a set of them: {', '.join(sets)}"
        )


def _open_npz(source: str, path: Path) -> ImageSet:
    """The images under ADM's key, or in the only array that can be one of images."""
    arrays = read_npz(path)
    if IMAGES in arrays:
        return _from_array(source, "npz", arrays[IMAGES])
    candidates = [array for array in arrays.values() if array.ndim == 4]
    if len(candidates) != 1:
        shapes = [f"{name} {array.shape}" for name, array in arrays.items()]
        content = ", ".join(shapes) or "nothing"
        raise ValueError(
            f"{source} holds {content}; expected images (N, H, W, 3) under {IMAGES!r}, or one array of four "
            "axes"
        )
    return _from_array(source, "npz", candidates[0])


def _open_npy(source: str, path: Path) -> ImageSet:
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{source} cannot be read as an array: {error}") from None
    return _from_array(source, "npy", values)


def _from_array(source: str, kind: str, values: np.ndarray) -> ImageSet:
    """A set of images (N, H, W, C), or (N, C, H, W) where the shape cannot mean anything else."""
    channels = (1, 3)
    if values.ndim == 4 and values.shape[1] in channels and values.shape[3] not in channels:
        values = values.transpose(0, 2, 3, 1)  # (N, H, W, C)
    values = to_uint8(values, source)
    images = []
    for index, image in enumerate(values):
        images.append(ArrayImage(f"{index:06d}", image))
    return _require_images(ImageSet(source, kind, images))


def _is_saved_dataset(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).exists() for name in SAVED_DATASET)


def _open_hub_dataset(source: str, download: bool) -> ImageSet:
    """`datasets:NAME[:SPLIT[:COLUMN]]`, NAME on the Hugging Face hub or a folder that `datasets` saved."""
    import datasets

    name, _, split_and_column = source.removeprefix(DATASETS).partition(":")
    split, _, column = split_and_column.partition(":")
    if _is_saved_dataset(Path(name)):
        dataset = datasets.load_from_disk(name)
        if split:
            dataset = dataset[split]
    else:
        config = datasets.DownloadConfig(local_files_only=not download)
        dataset = datasets.load_dataset(name, split=split or "train", download_config=config)
    return _open_dataset(source, dataset, column or None)


def _open_dataset(source: str, dataset: object, column: str | None) -> ImageSet:
    """The images of a column; None: of the first image column."""
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"{source} has splits {', '.join(dataset)}; name one: {DATASETS}FOLDER:SPLIT")
    image_columns = []
    for name, column_type in dataset.features.items():
        if isinstance(column_type, datasets.Image):
            image_columns.append(name)
    if column is None:
        column = image_columns[0] if image_columns else ""
    if column not in image_columns:
        raise ValueError(f"{source} has no image column {column!r}{did_you_mean(column, image_columns)}")
    # not decoded: `open_image` reads all images alike, and an unreadable one must not end the iteration
    encoded = dataset.cast_column(column, datasets.Image(decode=False))
    return _require_images(ImageSet(source, "datasets", _DatasetImages(encoded, column)))


@dataclass(frozen=True)
class _DatasetImages(Sequence):
    """The rows of a data set as images that are read when they are needed."""

    dataset: object
    column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | slice) -> LazyImage | list[LazyImage]:
        if isinstance(index, slice):  # as of any Sequence
            return [self[row] for row in range(*index.indices(len(self)))]
        encoded = self.dataset[index][self.column]  # {"bytes": ..., "path": ...}
        name = f"{index:06d}"
        if encoded.get("bytes") is not None:
            return ImageFile(name, StoredImage(name, encoded["bytes"]))
        return ImageFile(name, Path(encoded["path"]))


def _require_images(image_set: ImageSet) -> ImageSet:
    if not len(image_set):
        raise ValueError(f"no images in {image_set.source!r}")
    return image_set
