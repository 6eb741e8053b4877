"""Files of a folder, and how far links in it are followed.

A link may lead anywhere within the data's root. Data of a stranger can hold a link to a file of yours; so a
link out of the root is followed only when a person says so (`--follow_links`).
"""

from __future__ import annotations

import os
from pathlib import Path

SNAPSHOTS = "snapshots"  # in the hub's cache: models--OWNER--NAME/snapshots/COMMIT/FILE -> ../../blobs/SHA256
BLOBS = "blobs"


def is_inside(path: Path, folder: str | Path) -> bool:
    """Whether a path, with all links followed, lies within a folder; a link to itself leads nowhere else."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def link_root(folder: str | Path) -> Path:
    """The folder that links of `folder` must not leave.

    It is the folder itself. A snapshot in the Hugging Face hub's cache, or a folder in one, consists of links
    into the repository's `blobs`: there it is the folder of the repository.
    """
    folder = Path(folder).absolute()
    for candidate in (folder, *folder.parents):
        repository = candidate.parent.parent
        if candidate.parent.name == SNAPSHOTS and (repository / BLOBS).is_dir():
            return repository
    return folder


def escapes_root(path: Path, folder: str | Path) -> bool:
    """Whether a path in a folder is a link, or stands behind one, that leaves the folder's root."""
    return not is_inside(path, folder) and not is_inside(path, link_root(folder))


def visible_files(
    folder: str | Path, *, recursive: bool = False, follow_links: bool = False
) -> tuple[list[Path], list[Path]]:
    """The files of a folder that are not hidden, in the order of their names.

    Args:
        recursive: with those of the folders in it, links to folders too.
        follow_links: also where links lead out of the folder's root.

    Returns:
        The files (a link to nothing is one of them, to be named when it is read), and the links to folders
        that were not entered because they lead out of the root.
    """
    folder = Path(folder)
    files: list[Path] = []
    refused: list[Path] = []

    def collect(place: Path, ancestors: tuple[Path, ...]) -> None:
        for path in place.iterdir():
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                files.append(path)
                continue
            target = path.resolve()
            if not recursive or target in ancestors:  # a link to a folder above it would never end
                continue
            if follow_links or not escapes_root(path, folder):
                collect(path, (*ancestors, target))
            else:
                refused.append(path)

    collect(folder, (folder.resolve(),))
    return sorted(files), sorted(refused)
