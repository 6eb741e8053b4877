"""Images in zip files and arrays in npz files from untrusted sources.

Nothing is unpacked to disk and nothing is unpickled; archives that would unpack to far more than their size
(decompression bombs) and names that lead out of the archive are refused.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from diffadapt.common.images import IMAGE_SUFFIXES

MAX_IMAGE_BYTES = 512 << 20  # of one unpacked image file
MAX_RATIO = 200  # unpacked bytes / packed bytes: images hardly shrink, bombs by a factor of a thousand
RATIO_CHECKED_ABOVE = 1 << 20  # unpacked bytes; a bomb smaller than this does no harm
IMAGES = "arr_0"  # key of the images in an npz file as guided-diffusion writes it


@dataclass(frozen=True)
class ZipImage:
    """An image in a zip file, read without unpacking the others. An `ImageSource`."""

    archive: zipfile.ZipFile = field(repr=False)
    info: zipfile.ZipInfo = field(repr=False)

    @property
    def name(self) -> str:
        return self.info.filename

    def read_bytes(self) -> bytes:
        """The unpacked file.

        Raises:
            ValueError: there are more bytes than the archive's directory says.
        """
        with self.archive.open(self.info) as file:
            data = file.read(self.info.file_size + 1)  # one byte more shows that the directory lies
        if len(data) > self.info.file_size:
            raise ValueError(f"{self.name} unpacks to more than the {self.info.file_size:,} bytes it claims")
        return data

    def __str__(self) -> str:
        return self.name


def zip_images(path: Path) -> list[ZipImage]:
    """The images of a zip file in the order of their names.

    Raises:
        ValueError: the archive is damaged or encrypted, is a decompression bomb, or has names that lead out
            of it.
    """
    archive = _open_archive(path)
    images = []
    for info in archive.infolist():
        if _is_image(info):
            _check_entry(path, info, limit=MAX_IMAGE_BYTES)
            images.append(ZipImage(archive, info))
    return sorted(images, key=lambda image: image.name)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name.

    Raises:
        ValueError: the file is damaged, holds pickled objects, or is a decompression bomb.
    """
    with _open_archive(path) as archive:
        for info in archive.infolist():
            _check_entry(path, info, limit=None)  # arrays of many images may be large
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} cannot be read as arrays: {error}") from None


def array_names(path: Path) -> list[str]:
    """The names of the arrays in an npz file, which are not read."""
    with _open_archive(path) as archive:
        return [Path(name).stem for name in archive.namelist()]


def _open_archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no readable archive: {error}") from None


def _is_image(info: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(info.filename)
    is_hidden = path.name.startswith(".") or "__MACOSX" in path.parts  # macOS adds a folder of metadata
    return not info.is_dir() and not is_hidden and path.suffix.lower() in IMAGE_SUFFIXES


def _check_entry(path: Path, info: zipfile.ZipInfo, *, limit: int | None) -> None:
    """Refuses an entry of an archive before it is unpacked.

    Args:
        path: the archive, for messages.
        info: the entry.
        limit: most unpacked bytes; None for no limit.
    """
    name = PurePosixPath(info.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{path} holds {info.filename!r}, a name that leads out of it; it was not read")
    if info.flag_bits & 1:  # bit 0 of the general purpose flags: encrypted
        raise ValueError(f"{path} is encrypted; unpack it and give the folder")
    packed_bytes = max(info.compress_size, 1)  # an empty file has 0
    is_dense = info.file_size > RATIO_CHECKED_ABOVE and info.file_size > MAX_RATIO * packed_bytes
    is_too_large = limit is not None and info.file_size > limit
    if is_dense or is_too_large:
        raise ValueError(
            f"{path}: {info.filename} unpacks from {packed_bytes:,} to {info.file_size:,} bytes; "
            "it is refused as a decompression bomb"
        )
