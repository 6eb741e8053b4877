"""Pictures from disk to pixels: all common kinds are read alike, bad files are named before training."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from diffadapt.data.links import leads_out, visible_files

MAX_PIXELS = 178_956_970  # of one picture; more is a decompression bomb, as for Pillow
MAX_ASPECT = 32  # longer side / shorter side; scaled to the resolution, a thread of pixels fills the memory
MANY = 200  # pictures from which on checking shows its progress
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")  # that are read
EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"))


class ImageSource(Protocol):
    """Where a picture comes from; a `Path` is one. `str` gives the name that messages use."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class StoredImage:
    """A picture file held in memory."""

    name: str
    data: bytes = field(repr=False)

    def read_bytes(self) -> bytes:
        return self.data

    def __str__(self) -> str:
        return self.name


class UndrawnImage(StoredImage):
    """Stands for a picture that the base would draw before training."""


@dataclass(frozen=True)
class View:
    """Which part of a picture is trained on: (height, width) and (top, left) in pixels."""

    original_size: tuple[int, int]  # of the upright picture
    crop: tuple[int, int]  # corner of the part within the scaled picture (mirrored, when it is mirrored)
    size: tuple[int, int]  # of the part


def list_images(folder: str | Path, *, recursive: bool = False, follow_links: bool = False) -> list[Path]:
    """The pictures of a folder (and of the folders in it) in the order of their names.

    Args:
        follow_links: also where they lead out of the folder, or out of its repository in the hub's cache.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no picture in it, or links to pictures elsewhere.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give the folder that holds your pictures")
    files, outside = visible_files(folder, recursive=recursive, follow_links=follow_links)
    paths = [path for path in files if path.suffix.lower() in EXTENSIONS]
    if not follow_links:
        outside += [path for path in paths if leads_out(path, folder)]
    if outside:
        raise ValueError(
            f"links out of {str(folder)!r}; copy the files instead, or give --follow_links:\n"
            f"{listed([str(path) for path in outside])}"
        )
    if not paths:
        kinds = " ".join(sorted(EXTENSIONS))
        raise ValueError(f"no pictures in {str(folder)!r}; expected files ending in {kinds}")
    return paths


def listed(lines: Sequence[str], *, most: int = 20) -> str:
    """One line each for a message, the first `most` of them."""
    rest = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  {line}" for line in [*lines[:most], *rest])


def open_image(source: str | ImageSource) -> Image.Image:
    """One picture as upright 8-bit RGB; transparency becomes white, an animation its first frame.

    Raises: ValueError for a picture above MAX_PIXELS (before it is unpacked) or MAX_ASPECT; for damaged files
    whatever Pillow raises.
    """
    with opened(source) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N", "F"):
            return _from_high_depth(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")


def opened(source: str | ImageSource) -> Image.Image:
    """A picture of one of FORMATS that is not unpacked yet.

    Pillow's other readers, of which one starts a program, never see the file.

    Raises: ValueError for a picture above MAX_PIXELS or MAX_ASPECT; for other files whatever Pillow raises.
    """
    place = source if isinstance(source, str | Path) else BytesIO(source.read_bytes())
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit stands below
        image = Image.open(place, formats=[name for name in FORMATS if name in Image.OPEN])
    try:
        _check_size(image.size)
    except ValueError:
        image.close()
        raise
    return image


def check_images(sources: Sequence[ImageSource]) -> list[tuple[int, int]]:
    """Reads every picture once, so that nothing unreadable turns up in the middle of a run.

    Returns: the (width, height) of each.
    Raises: ValueError that lists the unreadable files.
    """
    sizes, problems = [], []
    for source in tqdm(sources, desc="checking pictures", disable=len(sources) < MANY):
        try:
            sizes.append(open_image(source).size)
        except Exception as error:  # damaged files make Pillow raise almost anything
            problems.append(f"{source}: {error or type(error).__name__}")
    if problems:
        count = f"{len(problems)} of {len(sources)}"
        raise ValueError(f"{count} pictures cannot be read; remove or repair:\n{listed(problems)}")
    return sizes


def to_pixels(
    image: Image.Image,
    size: int | tuple[int, int],
    *,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> Tensor:
    """Scales the picture to just cover `size`, cuts that part out and maps it to [-1, 1].

    Args:
        size: (height, width) of the part, or the side of a square.
        crop: where the part lies along (width, height), from 0 (left, top) to 1; (0.5, 0.5) is the centre.
        flip: mirror the part left to right.
    Returns: (3, height, width), float32.
    """
    height, width = (size, size) if isinstance(size, int) else size
    scaled = _scaled(image.size, (height, width))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = _corner(scaled, (height, width), crop)
    image = image.crop((left, top, left + width, top + height))
    if flip:
        image = ImageOps.mirror(image)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W), uint8
    return values.float() / 127.5 - 1


def view_of(
    image_size: tuple[int, int],
    size: tuple[int, int],
    *,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> View:
    """What `to_pixels` cuts from a picture of `image_size` (width, height), in numbers.

    A mirrored part has its corner where it lies in the mirrored picture, as in diffusers' SDXL scripts,
    which mirror before they cut.
    """
    (height, width), scaled = size, _scaled(image_size, size)
    left, top = _corner(scaled, (height, width), crop)
    if flip:
        left = scaled[0] - width - left
    return View(original_size=image_size[::-1], crop=(top, left), size=(height, width))


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are refused as a decompression bomb")
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def _scaled(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the picture when it just covers `size` (height, width)."""
    scale = max(size[0] / image_size[1], size[1] / image_size[0])
    return max(size[1], round(image_size[0] * scale)), max(size[0], round(image_size[1] * scale))


def _corner(scaled: tuple[int, int], size: tuple[int, int], crop: tuple[float, float]) -> tuple[int, int]:
    """(left, top) of the part of `size` (height, width) in the scaled picture (width, height)."""
    return round(crop[0] * (scaled[0] - size[1])), round(crop[1] * (scaled[1] - size[0]))


def _from_high_depth(image: Image.Image) -> Image.Image:
    """16-bit and floating pictures to 8-bit; Pillow's own conversion would clip them to white."""
    values = np.asarray(image, dtype=np.float64)
    top = (
        1.0
        if image.mode == "F" and values.max(initial=0) <= 1
        else 255.0
        if values.max(initial=0) <= 255
        else 65535.0
    )
    grey = np.clip(values / top * 255, 0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
