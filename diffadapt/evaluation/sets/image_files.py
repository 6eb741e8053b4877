"""One image of a set: its bytes, its pixels, and the information that overlap and format checks need."""

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
class ImageInfo:
    """Information about a decoded image.

    Attributes:
        name: name in its set.
        sha256: hash of the file, or of the bytes of an array.
        pixels: SHA-256 of the decoded pixels.
        mirrored: SHA-256 of the pixels of the mirror image.
        dhash: 64-bit difference hash, nearly the same for images that look alike.
        dhash_mirrored: difference hash of the mirror image.
        format: "PNG", "JPEG", ..., "array".
        mode: Pillow's mode of the stored image, such as "RGB", "RGBA", "L".
        width: in pixels.
        height: in pixels.
        conversions: steps to 8-bit RGB that not every program takes; see `conversions_of`.
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


class LazyImage(Protocol):
    """An image that is read when it is needed."""

    name: str

    def digest(self) -> str:
        """SHA-256 of what is stored."""
        ...

    def load(self) -> tuple[Tensor, ImageInfo]:
        """The pixels, (3, H, W) uint8, and information about the image.

        A damaged file makes Pillow raise almost any exception.
        """
        ...


@dataclass(frozen=True)
class ImageFile:
    """A `LazyImage` in a file, in a zip archive or in the bytes of a data set's row."""

    name: str
    source: ImageSource

    def digest(self) -> str:
        return hashlib.sha256(self.source.read_bytes()).hexdigest()

    def load(self) -> tuple[Tensor, ImageInfo]:
        data = self.source.read_bytes()
        try:
            image = open_undecoded(StoredImage(self.name, data))
        except UnidentifiedImageError:
            raise ValueError(f"{len(data):,} bytes that are no image") from None
        with image:
            # as stored, before any conversion
            image_format = image.format or "?"
            mode = image.mode
            conversions = conversions_of(image)
            if mode == "F":  # TIFF with floats: training guesses their range, a score must not
                check_value_range(np.asarray(image), self.name)
        # Opened again: `open_image` turns the image upright and converts it, and these facts are lost.
        values = np.asarray(open_image(StoredImage(self.name, data)))  # (H, W, 3)
        sha256 = hashlib.sha256(data).hexdigest()
        info = _image_info(values, self.name, sha256, image_format, mode, conversions)
        return _channels_first(values), info


@dataclass(frozen=True)
class ArrayImage:
    """A `LazyImage` in memory, (H, W, 3) uint8."""

    name: str
    values: np.ndarray

    def digest(self) -> str:
        return _hash_array(self.values)

    def load(self) -> tuple[Tensor, ImageInfo]:
        info = _image_info(self.values, self.name, self.digest(), "array", "RGB", ())
        return _channels_first(self.values), info


def to_pil_image(image: LazyImage) -> Image.Image:
    """Reads an image to be looked at."""
    pixels, _ = image.load()  # (3, H, W)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def to_uint8(images: np.ndarray, name: str) -> np.ndarray:
    """Converts an array of images to 8-bit RGB.

    Args:
        images: (N, H, W, C), C 1 or 3, uint8 or floats in [0, 1], which are rounded once to the nearest.
        name: for messages.

    Returns:
        (N, H, W, 3) uint8.

    Raises:
        ValueError: floats out of range (also those in [-1, 1] and [0, 255]), another type or shape.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"{name}: expected images (N, H, W, 3), got an array of shape {images.shape}")
    if np.issubdtype(images.dtype, np.floating):
        check_value_range(images, name)
        images = (images.astype(np.float64) * 255).round().astype(np.uint8)
    elif images.dtype != np.uint8:
        raise ValueError(f"{name}: expected uint8, or floats in [0, 1], got {images.dtype}")
    if images.shape[-1] == 1:
        return np.repeat(images, 3, axis=-1)
    return images


def check_value_range(values: np.ndarray, name: str) -> None:
    """Checks that all floats lie in [0, 1].

    Raises:
        ValueError: they do not, with a guess of their range.
    """
    if not values.size:
        return
    low = float(values.min())
    high = float(values.max())
    if low >= 0 and high <= 1:
        return
    if -1 <= low < 0 and high <= 1:
        guess = "they look like [-1, 1]: add 1 and halve"
    elif high > 2:
        guess = "divide by 255"
    else:
        guess = "rescale"
    is_finite = np.isfinite([low, high]).all()
    problem = f"values in [{low:g}, {high:g}]" if is_finite else "NaN or infinity"
    raise ValueError(f"{name}: float images must lie in [0, 1], found {problem}; {guess}")


def _difference_hashes(image: Image.Image) -> tuple[int, int]:
    """The difference hashes of an image and of its mirror image.

    Each of 64 bits says whether one of 8 x 8 places is darker than its right neighbour. The shrunk image is
    mirrored, not the image itself, whose shrunk mirror image may differ by rounding.
    """
    gray = image.convert("L").resize((9, 8), Image.Resampling.BILINEAR)
    values = np.asarray(gray).astype(int)  # (8, 9)
    return _hash_differences(values), _hash_differences(values[:, ::-1])


def _hash_differences(values: np.ndarray) -> int:
    """(8, 9) gray values to 64 bits."""
    is_darker = values[:, 1:] > values[:, :-1]  # (8, 8)
    return int.from_bytes(np.packbits(is_darker).tobytes(), "big")  # the first place is the highest bit


def conversions_of(image: Image.Image) -> tuple[str, ...]:
    """The properties of an opened image that plain 8-bit RGB does not have, in the words of a warning."""
    conversions = []
    if image.getexif().get(ORIENTATION, 1) != 1:
        conversions.append("turned upright by their EXIF orientation")
    if "transparency" in image.info or _is_transparent(image):
        conversions.append("transparent, put on white")
    if "icc_profile" in image.info:
        conversions.append("with an ICC profile")
    if image.mode.startswith("I") or image.mode == "F":
        conversions.append("of more than 8 bits")
    return tuple(conversions)


def _is_transparent(image: Image.Image) -> bool:
    """Whether any pixel is not opaque."""
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa"):
        return False
    alpha = image.getchannel(image.getbands()[-1])
    lowest, _ = alpha.getextrema()
    return lowest < 255


def _channels_first(values: np.ndarray) -> Tensor:
    """(H, W, 3) to (3, H, W)."""
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def _image_info(
    values: np.ndarray, name: str, sha256: str, image_format: str, mode: str, conversions: tuple[str, ...]
) -> ImageInfo:
    """The information about an image whose decoded pixels are `values` (H, W, 3)."""
    height, width = values.shape[:2]
    dhash, dhash_mirrored = _difference_hashes(Image.fromarray(values))
    return ImageInfo(
        name=name,
        sha256=sha256,
        pixels=_hash_array(values),
        mirrored=_hash_array(values[:, ::-1]),
        dhash=dhash,
        dhash_mirrored=dhash_mirrored,
        format=image_format,
        mode=mode,
        width=width,
        height=height,
        conversions=conversions,
    )


def _hash_array(values: np.ndarray) -> str:
    """SHA-256 of shape and values."""
    # the shape too: a 2 x 8 and a 4 x 4 image may have the same bytes
    return hashlib.sha256(str(values.shape).encode() + np.ascontiguousarray(values).tobytes()).hexdigest()
