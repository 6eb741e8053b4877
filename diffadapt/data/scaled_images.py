"""Images at training size: large files are decoded once, or by threads while the step before them runs."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from diffadapt.common.images import (
    JPEGS,
    ImageSource,
    covering_size,
    open_undecoded,
    to_pixels,
    to_srgb,
    upright_size,
)

IMAGE_MEMORY = 2 * 2**30  # bytes of scaled images that a run keeps
READERS = 4  # threads; Pillow lets others work while it decodes
SPARE = 2  # a JPEG is decoded at no less than this many times the training size
CHANNELS = 3

Size = tuple[int, int]  # (height, width) in pixels
Key = tuple[ImageSource, Size]


@dataclass(frozen=True)
class ScaledImage:
    """An image that just covers the training size.

    Attributes:
        image: upright, in sRGB.
        original_size: (width, height) of the upright image in its file.
    """

    image: Image.Image
    original_size: tuple[int, int]


def read_scaled(source: ImageSource, size: Size) -> ScaledImage:
    """An image from its file, scaled until it just covers `size`: a function of file and size alone.

    A large JPEG is decoded at 1/2, 1/4 or 1/8, the smallest of them that has at least SPARE times the width
    and height that it is scaled to.
    """
    with open_undecoded(source) as image:
        if image.format in JPEGS:
            original_size = upright_size(image)
            _reduce(image, original_size, size)
            managed = to_srgb(image)
        else:
            managed = to_srgb(image)
            original_size = managed.size
    scaled = covering_size(original_size, size)
    if managed.size != scaled:
        managed = managed.resize(scaled, Image.Resampling.BICUBIC)
    return ScaledImage(managed, original_size)


def training_pixels(source: ImageSource, resolution: int) -> Tensor:
    """The middle square of an image as training sees it, (3, resolution, resolution) in [-1, 1]."""
    size = (resolution, resolution)
    return to_pixels(read_scaled(source, size).image, size)


class ScaledImages:
    """Reads images ahead, and keeps those that fit into memory.

    Args:
        memory: bytes of images that are kept; the first ones that fit stay, since every epoch reads all.
    """

    def __init__(self, memory: int):
        self.memory = memory
        self._images: dict[Key, ScaledImage] = {}
        self._reading: dict[Key, Future[ScaledImage]] = {}
        self._readers: ThreadPoolExecutor | None = None

    def get(self, source: ImageSource, size: Size) -> ScaledImage:
        """The image as `read_scaled` gives it, whether it was kept, read ahead or is read now."""
        key = (source, size)
        if key in self._images:
            return self._images[key]
        reading = self._reading.pop(key, None)
        scaled = read_scaled(source, size) if reading is None else reading.result()
        width, height = scaled.image.size
        bytes_needed = CHANNELS * width * height
        if bytes_needed <= self.memory:
            self.memory -= bytes_needed
            self._images[key] = scaled
        return scaled

    def read_ahead(self, keys: Sequence[Key]) -> None:
        """Begins to read images in the background; a damaged one raises when it is asked for."""
        if self._readers is None:
            self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read-images")
        for source, size in keys:
            key = (source, size)
            if key not in self._images and key not in self._reading:
                self._reading[key] = self._readers.submit(read_scaled, source, size)


def _reduce(image: Image.Image, original_size: tuple[int, int], size: Size) -> None:
    """Lets a JPEG be decoded at a part of its size.

    Args:
        original_size: (width, height) of the upright image.
    """
    width, height = covering_size(original_size, size)
    smallest = (SPARE * width, SPARE * height)
    if original_size != image.size:  # lies on its side in the file
        smallest = smallest[::-1]
    image.draft(image.mode, smallest)
