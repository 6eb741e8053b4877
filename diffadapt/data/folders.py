"""Images in folders, with captions in text files or metadata, or in one folder per class.

File names in metadata lead to files of the data folder only: absolute names, `..` and links out of it are
errors. Files in a folder that are not used are reported in one line.
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
from diffadapt.common.symlinks import escapes_root, list_subfolders, visible_files
from diffadapt.data.captions import CAPTION_SUFFIXES, CaptionFiles
from diffadapt.data.examples import Example
from diffadapt.data.metadata import (
    METADATA,
    find_metadata_files,
    normalize_path,
    read_metadata_captions,
)

REPEATS = re.compile(r"([1-9]\d{0,2})_.+")  # kohya's "10_sks dog"; four digits would be a year
CAPTIONS_REMEDY = "for captions of images give --instance_captions"


def read_captioned_folder(
    folder: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    follow_links: bool = False,
    with_other_columns: bool = False,
) -> list[Example]:
    """Reads the images of a folder and its subfolders with their captions.

    Captions come from metadata files, each for all images below its folder; for images that no metadata file
    covers, from a .txt or .caption file beside the image. If all images lie in folders named like "10_name",
    these images are repeated ten times.

    Args:
        folder: the folder.
        image_column: the column of file names in metadata; None for file_name.
        caption_column: the column of captions; None for text, caption or prompt.
        follow_links: follow links out of the folder too.
        with_other_columns: fall back to the default columns, or to files beside images, if the requested
            columns do not exist.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: images have no caption, captions no image, or columns do not exist; the message lists
            them.
    """
    folder = Path(folder)
    images = list_images(folder, recursive=True, follow_links=follow_links)
    files, _ = visible_files(folder, recursive=True, follow_links=follow_links)
    captions = _read_captions(
        folder,
        files,
        images,
        image_column=image_column,
        caption_column=caption_column,
        follow_links=follow_links,
        with_other_columns=with_other_columns,
    )
    examples = []
    missing = []
    for path in images:
        examples.append(Example(path, captions.by_image[path]))
        if not captions.by_image[path]:
            missing.append(path)
    if missing:
        remedy = _missing_caption_remedy(missing[0], find_metadata_files(files))
        names = indented_list(missing)
        raise ValueError(f"{len(missing)} of {len(images)} images have no caption; {remedy}:\n{names}")
    notify_unused(folder, exclude_paths(files, [*images, *captions.files]))
    return _repeat(folder, examples)


def read_instance_folder(
    folder: str | Path, prompt: str, *, with_captions: bool = True, follow_links: bool = False
) -> list[Example]:
    """Reads the images of a subject, with their captions where they have one, otherwise with a prompt.

    Captions are found as by `read_captioned_folder`. Subfolders are not read, except in kohya's layout: no
    images in the folder itself, and all subfolders with images named like "10_sks dog".

    Args:
        folder: the folder.
        prompt: the caption of images without one.
        with_captions: False to ignore captions and give all images the prompt.
        follow_links: follow links out of the folder too.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the prompt is blank, or the reasons of `read_captioned_folder`.
    """
    if not prompt.strip():
        raise ValueError(
            f'--instance_prompt is blank, got {prompt!r}; say what the images show, as "a sks dog"'
        )
    folder = Path(folder)
    images = list_subject_images(folder, follow_links=follow_links)
    reads_subfolders = any(path.parent != folder for path in images)  # in kohya's layout
    files, _ = visible_files(folder, recursive=reads_subfolders, follow_links=follow_links)
    unread_folders = [] if reads_subfolders else list_subfolders(folder)
    if with_captions:
        captions = _read_captions(folder, files, images, follow_links=follow_links)
        remedies = {}
    else:
        captions = FolderCaptions(dict.fromkeys(images, ""), [])
        # caption files are unused then, which the report below says with this remedy
        remedies = dict.fromkeys((*CAPTION_SUFFIXES, ".jsonl", ".csv", ".parquet"), CAPTIONS_REMEDY)
    unused = exclude_paths(files, [*images, *captions.files])
    notify_unused(folder, unused, unread_folders, remedies=remedies)
    examples = [Example(path, captions.by_image[path] or prompt) for path in images]
    return _repeat(folder, examples)


def list_subject_images(folder: str | Path, *, follow_links: bool = False) -> list[Path]:
    """Lists the images of one subject: those in the folder, or, in kohya's layout, in its subfolders."""
    folder = Path(folder)
    return list_images(folder, recursive=_has_kohya_layout(folder), follow_links=follow_links)


def read_class_folders(folder: str | Path, *, follow_links: bool = False) -> tuple[list[Example], list[str]]:
    """Reads images from one folder per class.

    Returns:
        The examples with the number of their class, and the names of the classes.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no class folders in it, or one without images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give the folder that holds one folder per class")
    names = []
    links_outside = []
    for path in list_subfolders(folder):
        names.append(path.name)
        if escapes_root(path, folder):
            links_outside.append(path)
    if not names:
        raise ValueError(f"no class folders in {str(folder)!r}; expected one folder of images per class")
    if links_outside and not follow_links:
        raise ValueError(
            f"links out of {str(folder)!r}; copy the folders instead, or give --follow_links:\n"
            f"{indented_list(links_outside)}"
        )
    if all(name.isdecimal() for name in names):
        names.sort(key=int)  # 2 before 10
    examples: list[Example] = []
    unused, _ = visible_files(folder, follow_links=follow_links)
    unread_folders: list[Path] = []
    for label, name in enumerate(names):
        class_folder = folder / name
        images = list_images(class_folder, follow_links=follow_links)
        files, _ = visible_files(class_folder, follow_links=follow_links)
        unused += exclude_paths(files, images)
        unread_folders += list_subfolders(class_folder)
        examples += [Example(path, label) for path in images]
    notify_unused(folder, unused, unread_folders)
    return examples, names


@dataclass(frozen=True)
class FolderCaptions:
    """The captions of a folder's images.

    Attributes:
        by_image: image -> caption; empty if it has none.
        files: the files that the captions were read from.
    """

    by_image: dict[Path, str]
    files: list[Path]


def _missing_caption_remedy(image: Path, metadata: dict[Path, Path]) -> str:
    """Where to add the caption of an image: to the metadata that covers it, or to a new file."""
    for folder in image.parents:
        if folder in metadata:
            return f"add them to {metadata[folder]}, which holds the captions of all images below it"
    return (
        f'write it into {METADATA[0]} as {{"file_name": ..., "text": ...}}, or into a .txt file beside the '
        "image"
    )


def _read_captions(
    folder: Path,
    files: Sequence[Path],
    images: Sequence[Path],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    follow_links: bool = False,
    with_other_columns: bool = False,
) -> FolderCaptions:
    """Captions from metadata files, each for all images below it, otherwise from files beside images."""
    metadata = find_metadata_files(files)
    if not metadata and (image_column or caption_column) and not with_other_columns:
        raise ValueError(f"no {' or '.join(METADATA)} in {str(folder)!r}, so there are no columns to choose")
    captions: dict[Path, str] = {}
    source_of: dict[Path, Path] = {}  # image -> metadata file with its caption
    num_lists = 0
    for path in metadata.values():
        content = read_metadata_captions(
            path,
            files,
            root=folder,
            image_column=image_column,
            caption_column=caption_column,
            follow_links=follow_links,
            with_other_columns=with_other_columns,
        )
        num_lists += content.num_lists
        # Metadata files in nested folders may list the same image; then they have to agree.
        for image, caption in content.captions.items():
            if captions.get(image, caption) != caption:
                raise ValueError(
                    f"{source_of[image]} and {path} caption {image} differently; keep one of them"
                )
            captions[image] = caption
            source_of[image] = path
    if num_lists:
        notify(f"{num_lists} images of {str(folder)!r} have several captions: the first of each is used")
    return _add_files_beside(folder, files, images, metadata, captions, follow_links)


def _add_files_beside(
    folder: Path,
    files: Sequence[Path],
    images: Sequence[Path],
    metadata: dict[Path, Path],
    metadata_captions: dict[Path, str],
    follow_links: bool,
) -> FolderCaptions:
    """The captions of metadata, and those of files beside images that no metadata file covers."""
    caption_files = CaptionFiles(files, folder, follow_links=follow_links)
    by_image: dict[Path, str] = {}
    used_files = list(metadata.values())
    for image in images:
        # An image below a metadata file that does not list it has no caption, whatever lies beside it.
        if any(parent in metadata for parent in image.parents):
            by_image[image] = metadata_captions.get(normalize_path(image), "")
        else:
            by_image[image] = caption_files.caption(image)
            used_files += caption_files.beside(image)
    return FolderCaptions(by_image, used_files)


def _has_kohya_layout(folder: Path) -> bool:
    """Whether a folder has the layout of kohya's scripts: all images in subfolders named like "10_name"."""
    if not folder.is_dir():
        return False
    files, _ = visible_files(folder)  # of the folder alone
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
        return False
    image_folders = folders_with_images(list_subfolders(folder))
    return bool(image_folders) and all(REPEATS.fullmatch(path.name) for path in image_folders)


def _repeat(folder: Path, examples: list[Example]) -> list[Example]:
    """Repeats the examples as often as the number in the name of their folder says, in kohya's layout."""
    if not _has_kohya_layout(folder):
        _notify_not_repeated(folder, examples)
        return examples
    repeats: dict[str, int] = {}  # by name of the subfolder
    repeated: list[Example] = []
    for example in examples:
        name = _subfolder_name(folder, example)
        repeats[name] = int(REPEATS.fullmatch(name)[1])
        repeated += [example] * repeats[name]
    counts = ", ".join(f"{name!r} {count} times" for name, count in sorted(repeats.items()))
    notify(f"images are repeated in an epoch as the names of their folders say: {counts}")
    return repeated


def _notify_not_repeated(folder: Path, examples: Sequence[Example]) -> None:
    """Reports subfolders named like "10_name" if other images do not lie in such folders."""
    numbered = set()
    for example in examples:
        name = _subfolder_name(folder, example)
        # an image in the folder itself may have such a name too, "10_dog.png"
        if REPEATS.fullmatch(name) and (folder / name).is_dir():
            numbered.add(name)
    if numbered:
        notify(
            f"nothing is repeated as {shorten_list(sorted(numbered))} of {str(folder)!r} may mean: "
            "not all images lie in folders whose names begin with a number of repeats"
        )


def _subfolder_name(folder: Path, example: Example) -> str:
    """The first part of an image's path below the folder: its subfolder, or its own name."""
    return example.source.relative_to(folder).parts[0]


def notify_unused(
    folder: Path,
    files: Sequence[Path],
    folders: Sequence[Path] = (),
    *,
    remedies: dict[str, str] | None = None,
) -> None:
    """Reports in one line what is in a folder and not used.

    Args:
        folder: the folder.
        files: the unused files in it.
        folders: the subfolders that are not read; those with images are reported.
        remedies: suffix -> how to use these files.
    """
    unused = describe_unused(files, folders_with_images(folders), remedies=remedies)
    if unused:
        notify(f"not used of {str(folder)!r}: {unused}")
