"""Text files read alike on every system, and files written so that nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

ON_WINDOWS = os.name == "nt"


def read_text(path: str | Path) -> str:
    """The text of a file that a person wrote: UTF-8 in every locale, without a byte order mark.

    Raises: OSError when it cannot be read, ValueError naming the file when it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it, and rename it to ``path``.

    A stop at any moment leaves the old file or the new one, never a torn one. Makes missing parent folders.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk.

    Windows opens no folders, and syncs only files that are open for writing.
    """
    if ON_WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if ON_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
