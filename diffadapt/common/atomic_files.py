"""Text files read alike on every system, and files written so that nothing is lost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

ON_WINDOWS = os.name == "nt"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | Path) -> str:
    """The text of a file that a person wrote: UTF-8 in every locale, without a byte order mark.

    Raises: OSError when it cannot be read, ValueError naming file, line and remedy when it is not UTF-8.
    """
    content = Path(path).read_bytes()
    if content.startswith(UTF_16_MARKS) or b"\0" in content:
        raise ValueError(f"{path} is not UTF-8 text but looks like UTF-16, or is no text; save it as UTF-8")
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
    """The lines of a text, which end with a line feed.

    `str.splitlines` also splits at characters that stand within captions, such as U+2028 and U+0085.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


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


def write_utf8(path: str | Path, text: str) -> None:
    """`write_atomically` of a text in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_writable(path: str | Path) -> None:
    """Try whether a file can be written at ``path``, before the work whose result it shall hold.

    Nothing is left behind: a file is made and removed in the nearest folder that is there.

    Raises:
        ValueError: a folder is at ``path``, or a file where a folder of it should be.
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
    """The same for a folder that files are written to, which need not be there yet."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give a folder")
    check_writable(folder / ".diffadapt-probe")


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
