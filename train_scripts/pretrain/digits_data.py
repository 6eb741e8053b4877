"""Images of digits: printed ones, rendered from fonts in many colours; handwritten ones, from scikit-learn.

    python digits_data.py --assets ../../diffadapt/assets        # needs scikit-learn, matplotlib

Imported by digits.py (the base of one of the two domains) and digits_classifier.py (trained on both).
"""

import argparse
import io
import random
from collections.abc import Sequence
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import pyarrow.parquet as pq
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffadapt.common.images import open_image, to_pixels
from diffadapt.data.hub_tables import open_table, read_labelled_table

HELD_OUT = 397  # the last of scikit-learn's 1,797: never shown to the classifier or to an adapter
WITH_MATPLOTLIB = ("DejaVu*", "STIXGeneral*", "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")
TOO_THIN = ("Thin", "Hairline", "ExtraLight")  # nothing is left of them at 16 pixels
CANVAS = 64  # pixels a digit is rendered at before it is made small
MASK_HEIGHT = 100  # pixels
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue
MIN_CONTRAST = 80  # of digit and ground, in luminance
Labelled = tuple[Tensor, Tensor]  # (N, 3, side, side) uint8 and (N,) int64


def find_fonts(folders: Sequence[Path]) -> list[Path]:
    """Fonts with all ten digits: those matplotlib ships, and all of `folders`, in a fixed order."""
    shipped = Path(matplotlib.get_data_path()) / "fonts/ttf"
    paths: list[Path] = []
    for name in WITH_MATPLOTLIB:
        paths += shipped.glob(f"{name}.ttf")
    for folder in folders:
        for suffix in ("ttf", "otf"):
            paths += folder.rglob(f"*.{suffix}")
    fonts = []
    for path in paths:
        is_thin = any(word in path.name for word in TOO_THIN)
        if not is_thin and _has_digits(path):
            fonts.append(path)
    return sorted(fonts, key=lambda path: path.name)


def _has_digits(path: Path) -> bool:
    characters = TTFont(path, lazy=True).getBestCmap() or {}
    return all(ord(digit) in characters for digit in "0123456789")


def printed(fonts: Sequence[Path], count: int, side: int, seed: int = 0) -> Labelled:
    """`count` rendered digits, the ten classes in turn."""
    rng = random.Random(seed)
    masks = []  # of each font the ten digits
    for font in fonts:
        masks.append([_mask(font, digit) for digit in range(10)])
    images = np.stack([_scene(rng, rng.choice(masks)[n % 10], side) for n in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % 10


def _mask(font: Path, digit: int) -> Image.Image:
    """The bare digit, 100 pixels high."""
    face = ImageFont.truetype(str(font), 200)
    x0, y0, x1, y1 = face.getbbox(str(digit))  # without the font's margins
    mask = Image.new("L", (x1 - x0, y1 - y0))
    ImageDraw.Draw(mask).text((-x0, -y0), str(digit), fill=255, font=face)
    width = max(1, round(mask.width * MASK_HEIGHT / mask.height))
    return mask.resize((width, MASK_HEIGHT), Image.Resampling.LANCZOS)


def _scene(rng: random.Random, mask: Image.Image, side: int) -> np.ndarray:
    """One digit, turned, stretched and shifted, on a plain or graded ground: (side, side, 3)."""
    height = round(CANVAS * rng.uniform(0.6, 0.9))
    width = min(CANVAS - 4, round(mask.width * height / MASK_HEIGHT * rng.uniform(0.85, 1.2)))
    digit = mask.resize((max(4, width), height), Image.Resampling.BILINEAR)
    digit = digit.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
    x = _shifted_middle(rng, (CANVAS - digit.width) / 2)
    y = _shifted_middle(rng, (CANVAS - digit.height) / 2)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(digit, (x, y))
    canvas = canvas.resize((side, side), Image.Resampling.BOX)  # the mean over each pixel: soft edges
    coverage = np.asarray(canvas, np.float32)[..., None] / 255  # (side, side, 1), 1: the digit
    ink, ground = _colours(rng)
    pixels = coverage * ink + (1 - coverage) * _ground(rng, ground, side)
    return pixels.clip(0, 255).round().astype(np.uint8)


def _shifted_middle(rng: random.Random, margin: float) -> int:
    """A position around the middle that leaves the digit on the canvas."""
    return round(margin + rng.uniform(-0.6, 0.6) * max(0, margin))


def _colours(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Two colours of clearly different lightness, (3,) each."""
    while True:
        ink = np.array([rng.uniform(0, 255) for _ in "rgb"], np.float32)
        ground = np.array([rng.uniform(0, 255) for _ in "rgb"], np.float32)
        if abs(LUMINANCE @ (ink - ground)) > MIN_CONTRAST:
            return ink, ground


def _ground(rng: random.Random, colour: np.ndarray, side: int) -> np.ndarray:
    """(side, side, 3): in half of all images it changes from one edge to the other."""
    slope = np.array([rng.uniform(-40, 40) for _ in "rgb"], np.float32) * (rng.random() < 0.5)
    ramp = np.linspace(-0.5, 0.5, side, dtype=np.float32)[:, None, None] * slope  # (side, 1, 3)
    is_vertical = rng.random() < 0.5
    if not is_vertical:
        ramp = ramp.swapaxes(0, 1)
    return colour + np.broadcast_to(ramp, (side, side, 3))


def handwritten(side: int) -> dict[str, Labelled]:
    """scikit-learn's digits, scaled to `side`: {"train": the first 1,400, "held_out": the others}."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    arrays = []
    for values in digits.images:
        image = _to_image(values).resize((side, side), Image.Resampling.BICUBIC)
        arrays.append(np.asarray(image.convert("RGB")))
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)  # (N, 3, side, side)
    labels = torch.from_numpy(digits.target).long()
    cut = len(images) - HELD_OUT
    return {"train": (images[:cut], labels[:cut]), "held_out": (images[cut:], labels[cut:])}


def _to_image(values: np.ndarray) -> Image.Image:
    """8x8 values from 0 (paper) to 16 (ink) as white ink on black."""
    return Image.fromarray((values * 255 / 16).round().astype(np.uint8))


def write_handwriting(folder: Path) -> None:
    """train.parquet and test.parquet with columns `image` (PNG) and `label`, as `datasets` reads them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = [{"bytes": _to_png(values), "path": None} for values in digits.images]
    splits = {"train": slice(None, -HELD_OUT), "test": slice(-HELD_OUT, None)}
    for name, part in splits.items():
        values = {"image": rows[part], "label": digits.target[part].tolist()}
        table = datasets.Dataset.from_dict(values, features=columns).data.table
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd", compression_level=22)


def _to_png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    _to_image(values).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def read(data: str, config_name: str | None, resolution: int) -> Labelled:
    """The train split of any data set with classes; a folder with one folder of images per class is one."""
    examples, _ = read_labelled_table(open_table(data, config_name=config_name), name=data)
    pixels = torch.stack([to_pixels(open_image(example.source), resolution) for example in examples])
    labels = torch.tensor([example.caption for example in examples])
    return ((pixels + 1) * 127.5).round().to(torch.uint8), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, required=True)
    args = parser.parse_args()
    folder = args.assets / "handwriting"
    folder.mkdir(parents=True, exist_ok=True)
    write_handwriting(folder)
    print({path.name: path.stat().st_size for path in folder.glob("*.parquet")})


if __name__ == "__main__":
    main()
