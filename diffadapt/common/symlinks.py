"""Listing of folders, with a limit on where symbolic links may lead.

Data from a stranger can hold a link to a private file. So a link is followed only within the root of the
data, unless the user allows more (`--follow_links`).
"""

from __future__ import annotations

import os
from pathlib import Path

# Layout of the hub's cache: models--OWNER--NAME/snapshots/COMMIT/FILE -> ../../blobs/SHA256
SNAPSHOTS = "snapshots"
BLOBS = "blobs"


def is_inside(path: Path, folder: str | Path) -> bool:
    """Whether a path, with all links resolved, lies within a folder. A link to itself counts as inside."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def link_root(folder: str | Path) -> Path:
    """The folder that links in `folder` must not leave.

    It is the folder itself, with one exception: a snapshot in the cache of the Hugging Face hub consists of
    links to the `blobs` of its repository, so its root is the folder of the repository.
    """
    folder = Path(folder).absolute()
    for candidate in (folder, *folder.parents):
        repository = candidate.parent.parent
        if candidate.parent.name == SNAPSHOTS and (repository / BLOBS).is_dir():
            return repository
    return folder


def escapes_root(path: Path, folder: str | Path) -> bool:
    """Whether a path in a folder leads, by a link in any part of it, out of the folder's root."""
    return not is_inside(path, folder) and not is_inside(path, link_root(folder))


def visible_files(
    folder: str | Path, *, recursive: bool = False, follow_links: bool = False
) -> tuple[list[Path], list[Path]]:
    """Lists the files of a folder that are not hidden, sorted by path.

    Args:
        folder: the folder to list.
        recursive: include its subfolders, and links to folders.
        follow_links: enter links that lead out of the folder's root too.

    Returns:
        The files, and the links to folders that were not entered because they lead out of the root. A broken
        link counts as a file, so that reading it raises an error that names it.
    """
    folder = Path(folder)
    files: list[Path] = []
    refused_links: list[Path] = []

    def collect(place: Path, ancestors: tuple[Path, ...]) -> None:
        """Adds the content of a folder; `ancestors` are the resolved folders on the way to it."""
        for path in place.iterdir():
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                files.append(path)
                continue
            target = path.resolve()
            if not recursive or target in ancestors:  # a link to a parent folder would never end
                continue
            if follow_links or not escapes_root(path, folder):
                collect(path, (*ancestors, target))
            else:
                refused_links.append(path)

    collect(folder, (folder.resolve(),))
    return sorted(files), sorted(refused_links)


def list_subfolders(folder: Path) -> list[Path]:
    """Lists the folders in a folder that are not hidden, sorted by name."""
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
