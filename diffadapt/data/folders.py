"""Images in folders: a text file beside each, metadata in a table, or one folder per class.

Names in metadata lead to files of the data folder only: absolute names, `..` and links out of it are errors.
What is in a folder and not used is told in one line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffadapt.common.image_suffixes import (
    IMAGE_SUFFIXES,
    describe_unused,
    exclude_paths,
    folders_with_images,
)
from diffadapt.common.images import list_images
from diffadapt.common.messages import indented_list, notify, shorten_list
from diffadapt.common.symlinks import escapes_root, visible_files
from diffadapt.data.captions import CAPTION_ENDINGS, CaptionFiles
from diffadapt.data.examples import Example
from diffadapt.data.metadata import METADATA, find_metadata_files, normalize_path, read_metadata_captions

REPEATS = re.compile(r"([1-9]\d{0,2})_.+")  # kohya's "10_sks dog"; four digits would be a year
USE_CAPTIONS = "for captions of images give --instance_captions"


def read_captioned_folder(
    folder: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    follow_links: bool = False,
    with_other_columns: bool = False,
) -> list[Example]:
    """The images of a folder, and of the folders in it, with their captions.

    Captions come from the metadata files in it, each for the folder it lies in; for images without one above
    them from a .txt or .caption file beside the image. Where all images lie in folders named as "10_name",
    those are there ten times.

    Args:
        image_column: of the metadata's names of files; default: file_name.
        caption_column: of its captions; default: text, caption or prompt.
        follow_links: also where they lead out of the folder.
        with_other_columns: the usual columns, or files beside images, will do where those are not there.
    Raises: FileNotFoundError or ValueError that lists images without caption, captions without image, or
        the columns there are.
    """
    folder = Path(folder)
    images = list_images(folder, recursive=True, follow_links=follow_links)
    files, _ = visible_files(folder, recursive=True, follow_links=follow_links)
    columns = {"image_column": image_column, "caption_column": caption_column}
    how = {"follow_links": follow_links, "with_other_columns": with_other_columns}
    captions = _captions(folder, files, images, **columns, **how)
    missing = [path for path in images if not captions.of[path]]
    if missing:
        names = indented_list([str(path) for path in missing])
        remedy = _caption_remedy(missing[0], find_metadata_files(files))
        raise ValueError(f"{len(missing)} of {len(images)} pictures have no caption; {remedy}:\n{names}")
    notify_unused(folder, exclude_paths(files, [*images, *captions.files]))
    return _repeated(folder, [Example(path, captions.of[path]) for path in images])


def read_instance_folder(
    folder: str | Path, prompt: str, *, with_captions: bool = True, follow_links: bool = False
) -> list[Example]:
    """The images of a folder with captions as of `read_captioned_folder`; those without one get `prompt`.

    Folders in it are not read, but for kohya's layout: no images in the folder itself, and folders in it that
    are all named as "10_sks dog".

    Args:
        with_captions: False: all with `prompt`.
    Raises: as `read_captioned_folder`, and ValueError for a blank prompt.
    """
    if not prompt.strip():
        raise ValueError(
            f'--instance_prompt is blank, got {prompt!r}; say what the images show, as "a sks dog"'
        )
    folder = Path(folder)
    images = list_subject_images(folder, follow_links=follow_links)
    in_folders = any(path.parent != folder for path in images)
    files, _ = visible_files(folder, recursive=in_folders, follow_links=follow_links)
    captions = FolderCaptions(dict.fromkeys(images, ""), [])
    remedies = dict.fromkeys((*CAPTION_ENDINGS, ".jsonl", ".csv", ".parquet"), USE_CAPTIONS)
    if with_captions:
        captions = _captions(folder, files, images, follow_links=follow_links)
        remedies = {}
    folders = [] if in_folders else list_subfolders(folder)
    notify_unused(folder, exclude_paths(files, [*images, *captions.files]), folders, remedies=remedies)
    return _repeated(folder, [Example(path, captions.of[path] or prompt) for path in images])


def list_subject_images(folder: str | Path, *, follow_links: bool = False) -> list[Path]:
    """The images of one subject: those in the folder itself, or, in kohya's layout, in the folders in it."""
    folder = Path(folder)
    return list_images(folder, recursive=_is_in_repeated_folders(folder), follow_links=follow_links)


def read_class_folders(folder: str | Path, *, follow_links: bool = False) -> tuple[list[Example], list[str]]:
    """Images in one folder per class. Returns: examples with the number of their class, and the names.

    Raises: FileNotFoundError or ValueError for no folder, no class folders, or an empty one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give the folder that holds one folder per class")
    names = [path.name for path in list_subfolders(folder)]
    if not names:
        raise ValueError(f"no class folders in {str(folder)!r}; expected one folder of pictures per class")
    outside = [str(folder / name) for name in names if escapes_root(folder / name, folder)]
    if outside and not follow_links:
        raise ValueError(
            f"links out of {str(folder)!r}; copy the folders instead, or give --follow_links:\n"
            f"{indented_list(outside)}"
        )
    if all(name.isdecimal() for name in names):
        names.sort(key=int)  # 2 before 10
    examples: list[Example] = []
    unused, _ = visible_files(folder, follow_links=follow_links)
    inner: list[Path] = []
    for label, name in enumerate(names):
        images = list_images(folder / name, follow_links=follow_links)
        files, _ = visible_files(folder / name, follow_links=follow_links)
        unused += exclude_paths(files, images)
        inner += list_subfolders(folder / name)
        examples += [Example(path, label) for path in images]
    notify_unused(folder, unused, inner)
    return examples, names


@dataclass(frozen=True)
class FolderCaptions:
    """The captions of a folder's images.

    Attributes:
        of: image -> caption; empty where there is none.
        files: that the captions were read from.
    """

    of: dict[Path, str]
    files: list[Path]


def _caption_remedy(image: Path, metadata: dict[Path, Path]) -> str:
    """Where the caption of an image without one would be read."""
    above = [metadata[place] for place in image.parents if place in metadata]
    if above:
        return f"add them to {above[0]}, which says the captions of all images below it"
    return (
        f'write it into {METADATA[0]} as {{"file_name": ..., "text": ...}}, or into a .txt file beside the '
        "picture"
    )


def _captions(
    folder: Path,
    files: Sequence[Path],
    images: Sequence[Path],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    follow_links: bool = False,
    with_other_columns: bool = False,
) -> FolderCaptions:
    """Captions from the metadata files of a folder, each for all below it, else from files beside images."""
    metadata = find_metadata_files(files)
    if not metadata and (image_column or caption_column) and not with_other_columns:
        raise ValueError(f"no {' or '.join(METADATA)} in {str(folder)!r}, so there are no columns to choose")
    captions: dict[Path, str] = {}
    said_in: dict[Path, Path] = {}
    lists = 0
    for path in metadata.values():
        part = read_metadata_captions(
            path,
            files,
            root=folder,
            image_column=image_column,
            caption_column=caption_column,
            follow_links=follow_links,
            with_other_columns=with_other_columns,
        )
        lists += part.lists
        for image, caption in part.captions.items():
            if captions.get(image, caption) != caption:
                raise ValueError(f"{said_in[image]} and {path} caption {image} differently; keep one of them")
            captions[image] = caption
            said_in[image] = path
    if lists:
        notify(f"{lists} images of {str(folder)!r} have several captions: the first of each is used")
    return _with_files_beside(folder, files, images, metadata, captions, follow_links)


def _with_files_beside(
    folder: Path,
    files: Sequence[Path],
    images: Sequence[Path],
    metadata: dict[Path, Path],
    captions: dict[Path, str],
    follow_links: bool,
) -> FolderCaptions:
    """The captions of metadata, and those of files beside images that no metadata file stands above."""
    beside = CaptionFiles(files, folder, follow_links=follow_links)
    of: dict[Path, str] = {}
    used = list(metadata.values())
    for image in images:
        if any(place in metadata for place in image.parents):
            of[image] = captions.get(normalize_path(image), "")
        else:
            of[image] = beside.caption(image)
            used += beside.beside(image)
    return FolderCaptions(of, used)


def _is_in_repeated_folders(folder: Path) -> bool:
    """Whether a folder is laid out as kohya's scripts have it: all images in folders named "10_name"."""
    if not folder.is_dir():
        return False
    files, _ = visible_files(folder)
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
        return False
    holders = folders_with_images(list_subfolders(folder))
    return bool(holders) and all(REPEATS.fullmatch(path.name) for path in holders)


def _notify_unrepeated(folder: Path, examples: Sequence[Example]) -> None:
    """One line where some images lie in folders named "10_name", and others do not."""
    places = {example.source.relative_to(folder).parts[0] for example in examples}
    numbered = sorted(name for name in places if REPEATS.fullmatch(name) and (folder / name).is_dir())
    if numbered:
        notify(
            f"nothing is repeated as {shorten_list(numbered)} of {str(folder)!r} may mean: "
            "not all images lie in folders whose names begin with a number of repeats"
        )


def _repeated(folder: Path, examples: list[Example]) -> list[Example]:
    """The examples, in kohya's layout each as often as the number before its folder's name says."""
    if not _is_in_repeated_folders(folder):
        _notify_unrepeated(folder, examples)
        return examples
    repeats: dict[str, int] = {}
    repeated: list[Example] = []
    for example in examples:
        name = example.source.relative_to(folder).parts[0]
        repeats[name] = int(REPEATS.fullmatch(name)[1])
        repeated += [example] * repeats[name]
    counts = ", ".join(f"{name!r} {count} times" for name, count in sorted(repeats.items()))
    notify(f"images are repeated in an epoch as the names of their folders say: {counts}")
    return repeated


def list_subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, in the order of their names."""
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]


def notify_unused(
    folder: Path,
    files: Sequence[Path],
    folders: Sequence[Path] = (),
    *,
    remedies: dict[str, str] | None = None,
) -> None:
    """One line about what is in a folder and not used.

    Args:
        files: that are not used.
        folders: in it, of which those with images are named.
        remedies: ending -> what would use these files.
    """
    unused = describe_unused(files, folders_with_images(folders), remedies=remedies)
    if unused:
        notify(f"not used of {str(folder)!r}: {unused}")
