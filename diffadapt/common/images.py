"""Pictures from disk to pixels: all common kinds are read alike, bad files are named before training."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from diffadapt.common.color_profiles import UnusableProfile, convert_to_srgb
from diffadapt.common.image_suffixes import IMAGE_SUFFIXES, describe_unused
from diffadapt.common.messages import indented_list, notify
from diffadapt.common.symlinks import escapes_root, visible_files

MAX_PIXELS = 357_913_940  # of one image; Pillow takes more for a decompression bomb
MAX_ASPECT = 32  # longer side / shorter side; scaled to the resolution, a thread of pixels fills the memory
MANY = 200  # pictures from which on checking shows its progress
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")  # that are read
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
JPEGS = ("JPEG", "MPO")  # formats that can be decoded at 1/2, 1/4 or 1/8 of their size
GIT_LFS = b"version https://git-lfs"
HIGH_DEPTH = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # modes of more than 8 bits
BITS_PER_SAMPLE = 258  # TIFF tag
ORIENTATION = 0x0112  # EXIF tag


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


class PlannedImage(StoredImage):
    """Stands for a picture that the base would draw before training."""


@dataclass(frozen=True)
class CropGeometry:
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
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not follow_links:
        outside += [path for path in paths if escapes_root(path, folder)]
    if outside:
        raise ValueError(
            f"links out of {str(folder)!r}; copy the files instead, or give --follow_links:\n"
            f"{indented_list([str(path) for path in outside])}"
        )
    if not paths:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
        others = describe_unused(files, [] if recursive else folders)
        raise ValueError(
            f"no pictures in {str(folder)!r}; expected files ending in {kinds}"
            + (f"; there are {others}" if others else "")
        )
    return paths


def open_image(source: str | ImageSource) -> Image.Image:
    """One image as upright 8-bit RGB; transparency becomes white, an animation its first frame.

    Numbers are taken as stored, without a look at the color profile, as programs that score images do;
    `to_srgb` reads them for training.

    Raises: ValueError for an image above MAX_PIXELS (before it is unpacked) or MAX_ASPECT, and for a format
    that needs a package; for damaged files whatever Pillow raises.
    """
    with open_undecoded(source) as image:
        return _over_white(_upright(image))


def to_srgb(image: Image.Image) -> Image.Image:
    """An image from `open_undecoded` as upright 8-bit RGB in sRGB, over white.

    A profile that cannot be used is ignored; `check_images` tells of it.
    """
    return _managed(image)[0]


def open_undecoded(source: str | ImageSource) -> Image.Image:
    """An image of one of the readable formats that is not unpacked yet.

    Pillow's other readers, of which one starts a program, never see the file.

    Raises: ValueError for an image above MAX_PIXELS or MAX_ASPECT, and for a format that needs a package; for
    other files whatever Pillow raises.
    """
    place = source if isinstance(source, str | Path) else BytesIO(source.read_bytes())
    formats = readable_formats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit stands below
        try:
            image = Image.open(place, formats=formats)
        except UnidentifiedImageError:
            _refuse_without_reader(_first_bytes(place), formats)
            raise UnidentifiedImageError(f"cannot identify image file {str(source)!r}") from None
        except Image.DecompressionBombError as error:
            raise ValueError(f"{error}; scale the image down before using it") from None
    try:
        _check_size(image.size)
    except ValueError:
        image.close()
        raise
    return image


@lru_cache(maxsize=1)
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of what is read: FORMATS as far as Pillow has them, and HEIF with pillow-heif."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        import pillow_heif
    except ImportError:
        return tuple(formats)
    pillow_heif.register_heif_opener()
    return (*formats, "HEIF")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of a JPEG from `open_undecoded` once it is turned as EXIF says.

    Of other formats the decoded image knows it: Pillow turns a TIFF file by itself.
    """
    is_on_its_side = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return image.size[::-1] if is_on_its_side else image.size


def check_images(sources: Sequence[ImageSource]) -> list[tuple[int, int]]:
    """Reads every image once, so that nothing unreadable turns up in the middle of a run.

    Color profiles that cannot be used are told. Of a JPEG all data is read, but not made into all pixels.

    Returns: the (width, height) of each.
    Raises: ValueError that lists the unreadable files.
    """
    sizes, problems, ignored = [], [], []
    for source in tqdm(sources, desc="checking images", disable=len(sources) < MANY):
        try:
            with open_undecoded(source) as image:
                size = None
                if image.format in JPEGS:
                    size = upright_size(image)
                    image.draft(image.mode, (1, 1))
                managed, profile_problem = _managed(image)
        except Exception as error:  # damaged files make Pillow raise almost anything
            problems.append(f"{source}: {error or type(error).__name__}")
            continue
        sizes.append(size or managed.size)
        if profile_problem:
            ignored.append(f"{source}: {profile_problem}")
    if problems:
        count = f"{len(problems)} of {len(sources)}"
        raise ValueError(f"{count} pictures cannot be read; remove or repair:\n{indented_list(problems)}")
    if ignored:
        notify(f"color profiles that are ignored, the colors are taken as sRGB:\n{indented_list(ignored)}")
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
    scaled = covering_size(image.size, (height, width))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = _corner(scaled, (height, width), crop)
    image = image.crop((left, top, left + width, top + height))
    if flip:
        image = ImageOps.mirror(image)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W), uint8
    return values.float() / 127.5 - 1


def covering_size(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the image when it just covers `size` (height, width)."""
    scale = max(size[0] / image_size[1], size[1] / image_size[0])
    return max(size[1], round(image_size[0] * scale)), max(size[0], round(image_size[1] * scale))


def crop_geometry(
    image_size: tuple[int, int],
    size: tuple[int, int],
    *,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> CropGeometry:
    """What `to_pixels` cuts from a picture of `image_size` (width, height), in numbers.

    A mirrored part has its corner where it lies in the mirrored picture, as in diffusers' SDXL scripts,
    which mirror before they cut.
    """
    (height, width), scaled = size, covering_size(image_size, size)
    left, top = _corner(scaled, (height, width), crop)
    if flip:
        left = scaled[0] - width - left
    return CropGeometry(original_size=image_size[::-1], crop=(top, left), size=(height, width))


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels are refused as a decompression bomb (more than {MAX_PIXELS:,}); "
            "scale the image down before using it"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def _corner(scaled: tuple[int, int], size: tuple[int, int], crop: tuple[float, float]) -> tuple[int, int]:
    """(left, top) of the part of `size` (height, width) in the scaled picture (width, height)."""
    return round(crop[0] * (scaled[0] - size[1])), round(crop[1] * (scaled[1] - size[0]))


def _managed(image: Image.Image) -> tuple[Image.Image, str]:
    """The upright image in sRGB, over white; and why its color profile is ignored, or ""."""
    upright = _upright(image)
    profile = image.info.get("icc_profile")
    if not profile:
        return _over_white(upright), ""
    try:
        return _over_white(convert_to_srgb(upright, profile)), ""
    except UnusableProfile as error:
        return _over_white(upright), str(error)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as EXIF says, in at most 8 bits per channel."""
    bits = _grey_bits(image)
    transparent = image.info.get("transparency")
    image = ImageOps.exif_transpose(image)
    return _to_eight_bits(image, bits, transparent) if image.mode in HIGH_DEPTH else image


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey_bits(image: Image.Image) -> int:
    """Bits of a grey value as the file stores it: 16, unless a TIFF file says fewer (microscopes: 12)."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    return bits if 8 < bits < 16 else 16


def _to_eight_bits(image: Image.Image, bits: int, transparent: object) -> Image.Image:
    """Grey values of `bits` bits, or floats, as 8-bit grey; Pillow's own conversion would clip them to white.

    Only floats, whose file does not say what is white, are judged by their largest value.
    """
    values = np.asarray(image, dtype=np.float64)
    white = 2.0**bits - 1
    if image.mode == "F":
        largest = values.max(initial=0)
        white = next((level for level in (1.0, 255.0) if largest <= level), 65535.0)
    if image.mode == "I" and not 0 <= values.min() <= values.max() <= white:
        raise ValueError(
            f"its grey values, {values.min():.0f} to {values.max():.0f}, are not of {bits} bits; "
            "save it with 8 or 16 bits"
        )
    grey = np.clip(values / white * 255, 0, 255).round().astype(np.uint8)
    if isinstance(transparent, int):
        grey[values == transparent] = 255  # PNG's transparent grey, over white
    return Image.fromarray(grey)


def _first_bytes(place: str | Path | BytesIO) -> bytes:
    """The bytes in which a format shows itself."""
    if isinstance(place, BytesIO):
        return place.getvalue()[: len(GIT_LFS)]
    with open(place, "rb") as file:
        return file.read(len(GIT_LFS))


def _refuse_without_reader(start: bytes, formats: Sequence[str]) -> None:
    """Raises: ValueError with the remedy for HEIF and AVIF files where nothing installed reads them, and for
    what stands in for a file that Git LFS has not downloaded.
    """
    if start.startswith(GIT_LFS):
        raise ValueError("Git LFS has not downloaded this file; run git lfs pull")
    if start[4:8] != b"ftyp":
        return
    if start[8:12] in HEIF_BRANDS and "HEIF" not in formats:
        raise ValueError("this is a HEIC image; pip install pillow-heif, or convert it to JPEG or PNG")
    if start[8:12] in AVIF_BRANDS and "AVIF" not in formats:
        raise ValueError("this is an AVIF image, which this Pillow does not read; pip install -U pillow")
