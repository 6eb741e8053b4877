"""Reading of images: from files of all common formats to tensors, with bad files named before training."""

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

from diffadapt.common.color_profiles import WITH_ALPHA, UnusableProfile, convert_to_srgb
from diffadapt.common.image_suffixes import IMAGE_SUFFIXES, describe_unused
from diffadapt.common.messages import indented_list, notify
from diffadapt.common.symlinks import escapes_root, list_subfolders, visible_files

MAX_PIXELS = 357_913_940  # of one image; above, Pillow takes it for a decompression bomb
MAX_ASPECT = 32  # longer side / shorter side; a thinner image, scaled to the resolution, fills the memory
PROGRESS_FROM = 200  # number of images from which on checking shows a progress bar
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")  # that are read
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
JPEGS = ("JPEG", "MPO")  # formats that can be decoded at 1/2, 1/4 or 1/8 of their size
GIT_LFS = b"version https://git-lfs"
HIGH_DEPTH = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # modes of more than 8 bits
BITS_PER_SAMPLE = 258  # TIFF tag
ORIENTATION = 0x0112  # EXIF tag
TURNED_BY_90 = (5, 6, 7, 8)  # values of ORIENTATION that exchange width and height


class ImageSource(Protocol):
    """The place an image is read from; a `Path` is one. `str` gives its name for messages."""

    def read_bytes(self) -> bytes:
        """The content of the image file."""
        ...


@dataclass(frozen=True)
class StoredImage:
    """An image file held in memory."""

    name: str
    data: bytes = field(repr=False)

    def read_bytes(self) -> bytes:
        return self.data

    def __str__(self) -> str:
        return self.name


class PlannedImage(StoredImage):
    """A placeholder for an image that the base would generate before training."""


@dataclass(frozen=True)
class CropGeometry:
    """The part of an image that is trained on, as the size conditions of SDXL describe it.

    Attributes:
        original_size: (height, width) of the upright image.
        crop: (y, x) of the part's upper left corner in the scaled, and perhaps mirrored, image.
        size: (height, width) of the part.
    """

    original_size: tuple[int, int]
    crop: tuple[int, int]
    size: tuple[int, int]


def list_images(folder: str | Path, *, recursive: bool = False, follow_links: bool = False) -> list[Path]:
    """Lists the images of a folder, sorted by path.

    Args:
        folder: the folder to list.
        recursive: include its subfolders.
        follow_links: follow links that lead out of the folder, or out of its repository in the hub's cache.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no images in it, or links to images outside.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give the folder that holds your images")
    files, links_outside = visible_files(folder, recursive=recursive, follow_links=follow_links)
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not follow_links:
        links_outside += [path for path in paths if escapes_root(path, folder)]
    if links_outside:
        raise ValueError(
            f"links out of {str(folder)!r}; copy the files instead, or give --follow_links:\n"
            f"{indented_list(links_outside)}"
        )
    if not paths:
        raise ValueError(_no_images(folder, files, recursive=recursive))
    return paths


def _no_images(folder: Path, files: Sequence[Path], *, recursive: bool) -> str:
    """The error for a folder without images: the readable suffixes, and the content of the folder."""
    folders = [] if recursive else list_subfolders(folder)
    message = f"no images in {str(folder)!r}; expected files ending in {' '.join(sorted(IMAGE_SUFFIXES))}"
    content = describe_unused(files, folders)
    if content:
        message += f"; there are {content}"
    return message


def open_image(source: str | ImageSource) -> Image.Image:
    """Reads an image as upright 8-bit RGB; transparency becomes white, an animation its first frame.

    Values are taken as stored, regardless of the color profile, as programs that score images do. `to_srgb`
    is the counterpart for training.

    Raises:
        ValueError: the image has more than MAX_PIXELS (found before it is decoded) or is thinner than
            MAX_ASPECT, or its format needs a package. Pillow raises other errors for damaged files.
    """
    with open_undecoded(source) as image:
        return _over_white(_upright(image))


def to_srgb(image: Image.Image) -> Image.Image:
    """Converts an image from `open_undecoded` to upright 8-bit RGB in sRGB, over white.

    A profile that cannot be used is ignored; `check_images` reports it.
    """
    converted, _ = _to_srgb(image)
    return converted


def open_undecoded(source: str | ImageSource) -> Image.Image:
    """Opens an image of one of the readable formats without decoding it.

    No other reader of Pillow ever sees the file: one of them starts a program.

    Raises:
        ValueError: the image has more than MAX_PIXELS or is thinner than MAX_ASPECT, or its format needs a
            package. Pillow raises other errors for damaged files.
    """
    place = source if isinstance(source, str | Path) else BytesIO(source.read_bytes())
    formats = readable_formats()
    with warnings.catch_warnings():
        # Pillow warns from half of MAX_PIXELS on; _check_size applies the limit.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
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
    """Pillow's names of the formats that are read: FORMATS if Pillow has them, and HEIF with pillow-heif."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        import pillow_heif
    except ImportError:
        return tuple(formats)
    pillow_heif.register_heif_opener()
    return (*formats, "HEIF")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """The (width, height) of an undecoded JPEG after the rotation that its EXIF data ask for.

    For other formats take the size of the decoded image: Pillow rotates a TIFF file by itself.
    """
    if image.getexif().get(ORIENTATION) in TURNED_BY_90:
        return image.size[::-1]
    return image.size


def check_images(sources: Sequence[ImageSource]) -> list[tuple[int, int]]:
    """Reads every image once, so that no unreadable file turns up in the middle of a run.

    Color profiles that cannot be used are reported. All data of a JPEG is read, but at a reduced
    size.

    Returns:
        The (width, height) of each image.

    Raises:
        ValueError: some images cannot be read; the message lists them.
    """
    sizes = []
    problems = []
    ignored_profiles = []
    for source in tqdm(sources, desc="checking images", disable=len(sources) < PROGRESS_FROM):
        try:
            with open_undecoded(source) as image:
                size = None
                if image.format in JPEGS:
                    size = upright_size(image)
                    image.draft(image.mode, (1, 1))  # decode at 1/8, the smallest size
                converted, profile_problem = _to_srgb(image)
        except Exception as error:  # damaged files make Pillow raise almost anything
            problems.append(f"{source}: {error or type(error).__name__}")
            continue
        sizes.append(size or converted.size)
        if profile_problem:
            ignored_profiles.append(f"{source}: {profile_problem}")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(sources)} images cannot be read; remove or repair them:\n"
            f"{indented_list(problems)}"
        )
    if ignored_profiles:
        notify(f"color profiles that are ignored (taken as sRGB):\n{indented_list(ignored_profiles)}")
    return sizes


def to_pixels(
    image: Image.Image,
    size: int | tuple[int, int],
    *,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> Tensor:
    """Scales an image until it just covers `size`, crops it, and maps it to [-1, 1].

    Args:
        image: an RGB image.
        size: (height, width) of the crop, or the side of a square, in pixels.
        crop: position of the crop along (width, height), from 0 (left, top) to 1; (0.5, 0.5) is the middle.
        flip: mirror the crop left to right.

    Returns:
        (3, height, width), float32.
    """
    height, width = (size, size) if isinstance(size, int) else size
    scaled_size = covering_size(image.size, (height, width))
    if scaled_size != image.size:
        image = image.resize(scaled_size, Image.Resampling.BICUBIC)
    x, y = _crop_corner(scaled_size, (height, width), crop)
    image = image.crop((x, y, x + width, y + height))
    if flip:
        image = ImageOps.mirror(image)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W), uint8
    return values.float() / 127.5 - 1  # 0 ... 255 to -1 ... 1


def covering_size(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) at which an image just covers `size`.

    Args:
        image_size: (width, height) of the image.
        size: (height, width) to cover.
    """
    width, height = image_size
    scale = max(size[0] / height, size[1] / width)
    # Rounding must not leave a side one pixel short.
    return max(size[1], round(width * scale)), max(size[0], round(height * scale))


def crop_geometry(
    image_size: tuple[int, int],
    size: tuple[int, int],
    *,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> CropGeometry:
    """The part that `to_pixels` crops from an image, in numbers.

    The corner of a mirrored part is its corner in the mirrored image, as in diffusers' SDXL scripts, which
    mirror before they crop.

    Args:
        image_size: (width, height) of the image.
        size: (height, width) of the crop.
        crop: see `to_pixels`.
        flip: see `to_pixels`.
    """
    height, width = size
    scaled_size = covering_size(image_size, size)
    x, y = _crop_corner(scaled_size, size, crop)
    if flip:
        x = scaled_size[0] - width - x
    # Pillow counts (width, height) and (x, y), SDXL's conditions (height, width) and (y, x).
    return CropGeometry(original_size=image_size[::-1], crop=(y, x), size=(height, width))


def _check_size(size: tuple[int, int]) -> None:
    """Refuses images that are too large or too thin.

    Raises:
        ValueError: the image of `size` (width, height) is one of them.
    """
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels are refused as a decompression bomb (more than {MAX_PIXELS:,}); "
            "scale the image down before using it"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def _crop_corner(
    scaled_size: tuple[int, int], size: tuple[int, int], crop: tuple[float, float]
) -> tuple[int, int]:
    """The upper left corner (x, y) of a crop of `size` (height, width).

    Args:
        scaled_size: (width, height) of the image.
        size: (height, width) of the crop.
        crop: see `to_pixels`.
    """
    spare_width = scaled_size[0] - size[1]
    spare_height = scaled_size[1] - size[0]
    return round(crop[0] * spare_width), round(crop[1] * spare_height)


def _to_srgb(image: Image.Image) -> tuple[Image.Image, str]:
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
    """The image rotated as its EXIF data ask for, with at most 8 bits per channel."""
    # exif_transpose drops what the conversion to 8 bits needs, so both are read before it.
    bits = _gray_bits(image)
    transparent = image.info.get("transparency")
    image = ImageOps.exif_transpose(image)
    if image.mode in HIGH_DEPTH:
        return _to_eight_bits(image, bits, transparent)
    return image


def _over_white(image: Image.Image) -> Image.Image:
    """The image as RGB, with white behind transparency."""
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _gray_bits(image: Image.Image) -> int:
    """The bits of a gray value in the file: 16, unless a TIFF file says fewer (microscopes store 12)."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    return bits if 8 < bits < 16 else 16


def _to_eight_bits(image: Image.Image, bits: int, transparent: object) -> Image.Image:
    """Scales gray values to 8 bits; Pillow's own conversion would clip them to white.

    Args:
        image: a gray image of a mode in HIGH_DEPTH.
        bits: the bits of its values. A file of floats does not say which value is white, so there it is
            judged by the largest value.
        transparent: the gray value that a PNG file declares transparent, or anything else.
    """
    values = np.asarray(image, dtype=np.float64)
    white = 2.0**bits - 1
    if image.mode == "F":  # floats are stored from 0 to 1, to 255 or to 65535
        largest = values.max(initial=0)
        white = 65535.0
        for level in (255.0, 1.0):
            if largest <= level:
                white = level
    if image.mode == "I" and not 0 <= values.min() <= values.max() <= white:
        raise ValueError(
            f"its gray values, {values.min():.0f} to {values.max():.0f}, do not fit into {bits} bits; "
            "save it with 8 or 16 bits"
        )
    gray = np.clip(values / white * 255, 0, 255).round().astype(np.uint8)
    if isinstance(transparent, int):
        gray[values == transparent] = 255  # transparency over white
    return Image.fromarray(gray)


def _first_bytes(place: str | Path | BytesIO) -> bytes:
    """The first bytes of a file, by which its format is recognized."""
    if isinstance(place, BytesIO):
        return place.getvalue()[: len(GIT_LFS)]
    with open(place, "rb") as file:
        return file.read(len(GIT_LFS))


def _refuse_without_reader(start: bytes, formats: Sequence[str]) -> None:
    """Raises the error with the right remedy for a file that Pillow cannot identify, if there is one.

    Args:
        start: the first bytes of the file.
        formats: the readable formats.

    Raises:
        ValueError: the file is HEIF or AVIF and no installed package reads it, or it is the pointer that Git
            LFS leaves in place of a file.
    """
    if start.startswith(GIT_LFS):
        raise ValueError("Git LFS has not downloaded this file; run git lfs pull")
    # ISO base media files (ISO/IEC 14496-12): bytes 4 to 8 are "ftyp", 8 to 12 the brand.
    if start[4:8] != b"ftyp":
        return
    if start[8:12] in HEIF_BRANDS and "HEIF" not in formats:
        raise ValueError("this is a HEIC image; pip install pillow-heif, or convert it to JPEG or PNG")
    if start[8:12] in AVIF_BRANDS and "AVIF" not in formats:
        raise ValueError("this is an AVIF image, which this Pillow does not read; pip install -U pillow")
