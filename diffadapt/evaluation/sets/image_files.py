"""One image of a set: its bytes and pixels, and the facts by which overlap and formats are judged."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffadapt.common.images import ImageSource, StoredImage, open_image, open_undecoded

ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class Facts:
    """What is known of a decoded image.

    Attributes:
        sha256: of the file, or of the bytes of an array.
        pixels, mirrored: SHA-256 of the decoded pixels, and of their mirror image.
        dhash, dhash_mirrored: 64-bit difference hashes, the same for images that look alike.
        format: "PNG", "JPEG", ..., "array".
        mode: as stored, such as "RGB", "RGBA", "L".
        conversions: what was done on the way to 8-bit RGB that not every program does: see `conversions_of`.
    """

    name: str
    sha256: str
    pixels: str
    mirrored: str
    dhash: int
    dhash_mirrored: int
    format: str
    mode: str
    width: int
    height: int
    conversions: tuple[str, ...] = ()


class Picture(Protocol):
    """An image that is read when it is needed, and known by the hash of what it is stored as."""

    name: str

    def digest(self) -> str: ...

    def load(self) -> tuple[Tensor, Facts]:
        """(3, H, W) uint8 and the facts; damaged files make Pillow raise almost anything."""
        ...


@dataclass(frozen=True)
class FilePicture:
    """An image in a file, a zip member or a data set's row of bytes."""

    name: str
    source: ImageSource

    def digest(self) -> str:
        return hashlib.sha256(self.source.read_bytes()).hexdigest()

    def load(self) -> tuple[Tensor, Facts]:
        data = self.source.read_bytes()
        try:
            image = open_undecoded(StoredImage(self.name, data))
        except UnidentifiedImageError:
            raise ValueError(f"{len(data):,} bytes that are no image") from None
        with image:
            kind, mode = image.format or "?", image.mode
            conversions = conversions_of(image)
            if mode == "F":
                refuse_out_of_range(np.asarray(image), self.name)
        pixels = np.asarray(open_image(StoredImage(self.name, data)))
        return _loaded(pixels, self.name, hashlib.sha256(data).hexdigest(), kind, mode, conversions)


@dataclass(frozen=True)
class ArrayPicture:
    """An image in memory, (H, W, 3) uint8."""

    name: str
    values: np.ndarray

    def digest(self) -> str:
        return _hash(self.values)

    def load(self) -> tuple[Tensor, Facts]:
        return _loaded(self.values, self.name, self.digest(), "array", "RGB")


def to_uint8(images: np.ndarray, name: str) -> np.ndarray:
    """(N, H, W, C) in uint8, or floats in [0, 1], rounded once to the nearest, to (N, H, W, 3) uint8.

    Raises: ValueError for floats out of range (also [-1, 1] and [0, 255]), other types or shapes.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"{name}: expected images (N, H, W, 3), got an array of shape {images.shape}")
    if np.issubdtype(images.dtype, np.floating):
        refuse_out_of_range(images, name)
        images = (images.astype(np.float64) * 255).round().astype(np.uint8)
    elif images.dtype != np.uint8:
        raise ValueError(f"{name}: expected uint8, or floats in [0, 1], got {images.dtype}")
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def refuse_out_of_range(values: np.ndarray, name: str) -> None:
    """Raises: ValueError unless all floats lie in [0, 1], with a guess of what they are."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if low >= 0 and high <= 1:
        return
    guess = "divide by 255" if high > 2 else "rescale"
    if -1 <= low < 0 and high <= 1:
        guess = "they look like [-1, 1]: add 1 and halve"
    problem = "NaN or infinity" if not np.isfinite([low, high]).all() else f"values in [{low:g}, {high:g}]"
    raise ValueError(f"{name}: float images must lie in [0, 1], found {problem}; {guess}")


def difference_hashes(image: Image.Image) -> tuple[int, int]:
    """64 bits, where 8 x 8 places are darker than their right neighbours; and of the mirror image."""
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR)).astype(int)
    return tuple(
        int("".join("1" if bit else "0" for bit in (view[:, 1:] > view[:, :-1]).flatten()), 2)
        for view in (small, small[:, ::-1])
    )


def conversions_of(image: Image.Image) -> tuple[str, ...]:
    """How an opened image differs from plain 8-bit RGB, in the words of a warning."""
    found = []
    if image.getexif().get(ORIENTATION, 1) != 1:
        found.append("turned upright by their EXIF orientation")
    if "transparency" in image.info or _has_alpha(image):
        found.append("transparent, put on white")
    if "icc_profile" in image.info:
        found.append("with an ICC profile")
    if image.mode.startswith("I") or image.mode == "F":
        found.append("of more than 8 bits")
    return tuple(found)


def _has_alpha(image: Image.Image) -> bool:
    """Whether a pixel is not opaque."""
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa"):
        return False
    return image.getchannel(image.getbands()[-1]).getextrema()[0] < 255


def _loaded(
    values: np.ndarray, name: str, sha256: str, kind: str, mode: str, conversions: tuple[str, ...] = ()
) -> tuple[Tensor, Facts]:
    height, width = values.shape[:2]
    hashes = (_hash(values), _hash(values[:, ::-1]), *difference_hashes(Image.fromarray(values)))
    pixels = torch.from_numpy(values.transpose(2, 0, 1).copy())
    return pixels, Facts(name, sha256, *hashes, kind, mode, width, height, conversions)


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(str(values.shape).encode() + np.ascontiguousarray(values).tobytes()).hexdigest()
