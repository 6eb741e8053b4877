"""Zips and npz files from anywhere: nothing is unpacked to disk, nothing unpickled, no bomb is opened."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from diffadapt.common.images import IMAGE_SUFFIXES

MAX_MEMBER = 512 << 20  # bytes of one image file
MAX_RATIO = 200  # unpacked against packed bytes: images hardly shrink, bombs by a thousand
IMAGES = "arr_0"  # key of the images in an npz as guided-diffusion writes it
SMALL = 1 << 20  # bytes below which the ratio does not matter


@dataclass(frozen=True)
class Member:
    """An image in a zip, read without unpacking the rest. An `ImageSource`."""

    archive: zipfile.ZipFile = field(repr=False)
    info: zipfile.ZipInfo = field(repr=False)

    @property
    def name(self) -> str:
        return self.info.filename

    def read_bytes(self) -> bytes:
        """Raises: ValueError when there are more bytes than the archive's list says."""
        with self.archive.open(self.info) as file:
            data = file.read(self.info.file_size + 1)
        if len(data) > self.info.file_size:
            raise ValueError(f"{self.name} unpacks to more than the {self.info.file_size:,} bytes it claims")
        return data

    def __str__(self) -> str:
        return self.name


def members_of(path: Path) -> list[Member]:
    """The images of a zip in the order of their names.

    Raises: ValueError for a damaged or encrypted archive, a bomb, and names that lead out of it.
    """
    archive = _open(path)
    members = [Member(archive, info) for info in archive.infolist() if _is_image(info)]
    for member in members:
        _check(path, member.info)
    return sorted(members, key=lambda member: member.name)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz. Raises: ValueError for pickled objects, damage and bombs."""
    with _open(path) as archive:
        for info in archive.infolist():
            _check(path, info, limit=None)
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} cannot be read as arrays: {error}") from None


def names_of(path: Path) -> list[str]:
    """The names of the arrays in an npz."""
    with _open(path) as archive:
        return [Path(name).stem for name in archive.namelist()]


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no readable archive: {error}") from None


def _is_image(info: zipfile.ZipInfo) -> bool:
    name = PurePosixPath(info.filename)
    hidden = name.name.startswith(".") or "__MACOSX" in name.parts
    return not info.is_dir() and not hidden and name.suffix.lower() in IMAGE_SUFFIXES


def _check(path: Path, info: zipfile.ZipInfo, limit: int | None = MAX_MEMBER) -> None:
    name = PurePosixPath(info.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{path} holds {info.filename!r}, a name that leads out of it; it was not read")
    if info.flag_bits & 1:
        raise ValueError(f"{path} is encrypted; unpack it and give the folder")
    packed = max(info.compress_size, 1)
    too_dense = info.file_size > SMALL and info.file_size > MAX_RATIO * packed
    if too_dense or (limit is not None and info.file_size > limit):
        raise ValueError(
            f"{path}: {info.filename} unpacks from {packed:,} to {info.file_size:,} bytes; "
            "it is refused as a bomb"
        )
