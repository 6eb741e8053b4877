"""Text files that read the same on every system, and writes that never leave a torn file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

ON_WINDOWS = os.name == "nt"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # byte order marks


def read_text(path: str | Path) -> str:
    """Reads a file that a person wrote: UTF-8 in every locale, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8; the message names the file, the line and the remedy.
    """
    content = Path(path).read_bytes()
    if content.startswith(UTF_16_MARKS) or b"\0" in content:  # UTF-16 has a zero in every Latin letter
        raise ValueError(f"{path} is not UTF-8 text: it looks like UTF-16 or binary data; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} of {path} is not UTF-8 text ({error}); save it as UTF-8, or convert it: "
            "iconv -f LATIN1 -t UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_lines(text: str) -> list[str]:
    """Splits a text at line feeds.

    `str.splitlines` also splits at characters that occur within captions, such as U+2028 and U+0085.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines[-1] == "":  # the text ends with a line feed
        lines.pop()
    return lines


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Writes a file so that a crash at any moment leaves the old file or the new one, never a part of it.

    Args:
        path: the file to write. Missing parent folders are created.
        write: fills a temporary file beside `path`, which is then synced and renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder: renaming is atomic within one file system only
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)  # before the rename, which may reach the disk before the content does
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)  # the new name


def write_utf8(path: str | Path, text: str) -> None:
    """Writes a text in UTF-8 by `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_writable(path: str | Path) -> None:
    """Checks that a file can be written, before the work whose result it will hold.

    Nothing is left behind: a file is created and removed in the nearest existing folder.

    Raises:
        ValueError: `path` is a folder, or a parent of it is a file.
        OSError: nothing can be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{str(path)!r} is a folder; give the name of a file in it, such as {path / 'a.json'}"
        )
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{str(path)!r} cannot be written: {str(folder)!r} is a file, not a folder")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".diffadapt-"):
            pass
    except OSError as error:
        raise OSError(
            f"{str(path)!r} cannot be written: {error.strerror or error}; give another place"
        ) from None


def check_writable_folder(folder: str | Path) -> None:
    """Checks that files can be written to a folder, which need not exist yet. See `check_writable`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give a folder")
    check_writable(folder / ".diffadapt-probe")


def sync(path: Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk.

    Windows cannot open folders, and syncs only files that are open for writing.
    """
    if ON_WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if ON_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
