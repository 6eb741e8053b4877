"""Images scaled to the training size: kept in memory where they fit, otherwise read ahead by threads."""

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
READER_THREADS = 4  # Pillow releases the interpreter lock while it decodes
OVERSAMPLING = 2  # a JPEG is decoded at no less than this many times the size it is scaled to
CHANNELS = 3

Size = tuple[int, int]  # (height, width) in pixels
Key = tuple[ImageSource, Size]


@dataclass(frozen=True)
class ScaledImage:
    """An image that just covers the training size.

    Attributes:
        image: the upright image in sRGB.
        original_size: (width, height) of the upright image in its file.
    """

    image: Image.Image
    original_size: tuple[int, int]


def read_scaled(source: ImageSource, size: Size) -> ScaledImage:
    """Reads an image and scales it until it just covers `size`.

    The result depends on the file and the size alone. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size:
    the smallest of them with at least OVERSAMPLING times the width and height that it is scaled to.
    """
    with open_undecoded(source) as image:
        if image.format in JPEGS:
            original_size = upright_size(image)
            _reduce(image, original_size, size)
            decoded = to_srgb(image)
        else:
            decoded = to_srgb(image)
            original_size = decoded.size
    scaled_size = covering_size(original_size, size)
    if decoded.size != scaled_size:
        decoded = decoded.resize(scaled_size, Image.Resampling.BICUBIC)
    return ScaledImage(decoded, original_size)


def training_pixels(source: ImageSource, resolution: int) -> Tensor:
    """The center crop of an image as training sees it, (3, resolution, resolution) in [-1, 1]."""
    size = (resolution, resolution)
    return to_pixels(read_scaled(source, size).image, size)


class ScaledImages:
    """Reads scaled images ahead, and keeps those that fit into memory.

    Args:
        memory: the bytes of images to keep. The first ones that fit stay, since every epoch reads all.
    """

    def __init__(self, memory: int):
        self.memory = memory
        self._images: dict[Key, ScaledImage] = {}
        self._pending: dict[Key, Future[ScaledImage]] = {}
        self._readers: ThreadPoolExecutor | None = None

    def get(self, source: ImageSource, size: Size) -> ScaledImage:
        """The image as `read_scaled` returns it, from memory, read ahead, or read now."""
        key = (source, size)
        if key in self._images:
            return self._images[key]
        pending = self._pending.pop(key, None)
        scaled = read_scaled(source, size) if pending is None else pending.result()
        width, height = scaled.image.size
        bytes_needed = CHANNELS * width * height
        if bytes_needed <= self.memory:
            self.memory -= bytes_needed
            self._images[key] = scaled
        return scaled

    def read_ahead(self, keys: Sequence[Key]) -> None:
        """Starts to read images in the background; the error of a damaged one is raised by `get`."""
        if self._readers is None:
            self._readers = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="read-images")
        for key in keys:
            if key not in self._images and key not in self._pending:
                source, size = key
                self._pending[key] = self._readers.submit(read_scaled, source, size)


def _reduce(image: Image.Image, original_size: tuple[int, int], size: Size) -> None:
    """Lets Pillow decode a JPEG at a fraction of its size.

    Args:
        image: the undecoded image.
        original_size: (width, height) of the upright image.
        size: (height, width) that the scaled image has to cover.
    """
    width, height = covering_size(original_size, size)
    smallest = (OVERSAMPLING * width, OVERSAMPLING * height)
    if original_size != image.size:  # rotated by 90 degrees in the file
        smallest = smallest[::-1]
    # libjpeg scales while it decodes, by powers of 2 and at almost no cost
    image.draft(image.mode, smallest)
