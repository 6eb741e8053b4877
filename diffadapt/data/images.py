"""Pictures from disk to pixels: all common kinds are read alike, bad files are named before training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"))


def list_images(folder: str | Path) -> list[Path]:
    """The pictures of a folder in the order of their names.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give the folder that holds your pictures")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        kinds = " ".join(sorted(EXTENSIONS))
        raise ValueError(f"no pictures in {str(folder)!r}; expected files ending in {kinds}")
    return paths


def open_image(path: str | Path) -> Image.Image:
    """One picture as upright 8-bit RGB; transparency becomes white, an animation its first frame."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N", "F"):
            return _from_high_depth(image)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")


def check_images(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Reads every picture once, so that nothing unreadable turns up in the middle of a run.

    Returns: the (width, height) of each.
    Raises: ValueError that lists all unreadable files.
    """
    sizes, problems = [], []
    for path in paths:
        try:
            sizes.append(open_image(path).size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(f"  {path}: {error}")
    if problems:
        listed = "\n".join(problems)
        raise ValueError(
            f"{len(problems)} of {len(paths)} pictures cannot be read; remove or repair:\n{listed}"
        )
    return sizes


def to_pixels(
    image: Image.Image, resolution: int, *, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Tensor:
    """Scales the shorter side to `resolution`, cuts a square and maps it to [-1, 1].

    Args:
        crop: where the square lies along (width, height), from 0 (left, top) to 1; (0.5, 0.5) is the centre.
    Returns: (3, resolution, resolution), float32.
    """
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = round(crop[0] * (width - resolution))
    top = round(crop[1] * (height - resolution))
    image = image.crop((left, top, left + resolution, top + resolution))
    if flip:
        image = ImageOps.mirror(image)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W), uint8
    return values.float() / 127.5 - 1


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
