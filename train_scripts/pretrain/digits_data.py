"""Pictures of digits: printed ones, rendered from fonts in many colours; handwritten ones, from scikit-learn.

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
CANVAS = 64  # pixels a digit is drawn at before it is made small
Labelled = tuple[Tensor, Tensor]  # (N, 3, side, side) uint8 and (N,) int64


def find_fonts(folders: Sequence[Path]) -> list[Path]:
    """Fonts with all ten digits: those matplotlib ships, and all of `folders`, in a fixed order."""
    own = Path(matplotlib.get_data_path()) / "fonts/ttf"
    paths = [path for name in WITH_MATPLOTLIB for path in own.glob(f"{name}.ttf")]
    paths += [path for folder in folders for kind in ("ttf", "otf") for path in folder.rglob(f"*.{kind}")]
    paths = [path for path in paths if not any(word in path.name for word in TOO_THIN)]
    return sorted((path for path in paths if _has_digits(path)), key=lambda path: path.name)


def _has_digits(path: Path) -> bool:
    known = TTFont(path, lazy=True).getBestCmap() or {}
    return all(ord(digit) in known for digit in "0123456789")


def printed(fonts: Sequence[Path], count: int, side: int, seed: int = 0) -> Labelled:
    """`count` rendered digits, the ten classes in turn."""
    rng, masks = random.Random(seed), [[_mask(font, digit) for digit in range(10)] for font in fonts]
    images = np.stack([_scene(rng, rng.choice(masks)[n % 10], side) for n in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % 10


def _mask(font: Path, digit: int) -> Image.Image:
    """The bare digit, 100 pixels high."""
    face = ImageFont.truetype(str(font), 200)
    left, top, right, bottom = face.getbbox(str(digit))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), str(digit), fill=255, font=face)
    return mask.resize((max(1, round(mask.width * 100 / mask.height)), 100), Image.Resampling.LANCZOS)


def _scene(rng: random.Random, mask: Image.Image, side: int) -> np.ndarray:
    """One digit, turned, stretched and shifted, in one colour on a plain or graded ground of another."""
    height = round(CANVAS * rng.uniform(0.6, 0.9))
    width = min(CANVAS - 4, round(mask.width * height / 100 * rng.uniform(0.85, 1.2)))
    digit = mask.resize((max(4, width), height), Image.Resampling.BILINEAR)
    digit = digit.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
    sheet = Image.new("L", (CANVAS, CANVAS))
    free = [(CANVAS - digit.width) / 2, (CANVAS - digit.height) / 2]
    place = [round(middle + rng.uniform(-0.6, 0.6) * max(0, middle)) for middle in free]
    sheet.paste(digit, tuple(place))
    sheet = sheet.resize((side, side), Image.Resampling.BOX)
    share = np.asarray(sheet, np.float32)[..., None] / 255
    ink, ground = _colours(rng)
    return (share * ink + (1 - share) * _ground(rng, ground, side)).clip(0, 255).round().astype(np.uint8)


def _colours(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Two colours of clearly different lightness."""
    weights = np.array([0.299, 0.587, 0.114])
    while True:
        ink, ground = (np.array([rng.uniform(0, 255) for _ in "rgb"], np.float32) for _ in range(2))
        if abs(weights @ (ink - ground)) > 80:
            return ink, ground


def _ground(rng: random.Random, colour: np.ndarray, side: int) -> np.ndarray:
    """(side, side, 3): in half of all pictures it changes from one edge to the other."""
    slope = np.array([rng.uniform(-40, 40) for _ in "rgb"], np.float32) * (rng.random() < 0.5)
    ramp = np.linspace(-0.5, 0.5, side, dtype=np.float32)[:, None, None] * slope
    ramp = ramp if rng.random() < 0.5 else ramp.swapaxes(0, 1)
    return colour + np.broadcast_to(ramp, (side, side, 3))


def handwritten(side: int) -> dict[str, Labelled]:
    """scikit-learn's digits, scaled to `side`: {"train": the first 1,400, "held_out": the others}."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = [_picture(values).resize((side, side), Image.Resampling.BICUBIC) for values in digits.images]
    images = torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures])).permute(0, 3, 1, 2)
    labels, cut = torch.from_numpy(digits.target).long(), len(images) - HELD_OUT
    return {"train": (images[:cut], labels[:cut]), "held_out": (images[cut:], labels[cut:])}


def _picture(values: np.ndarray) -> Image.Image:
    """8x8 values from 0 (paper) to 16 (ink) as white ink on black."""
    return Image.fromarray((values * 255 / 16).round().astype(np.uint8))


def write_handwriting(folder: Path) -> None:
    """train.parquet and test.parquet with columns `image` (PNG) and `label`, as `datasets` reads them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = [{"bytes": _png(values), "path": None} for values in digits.images]
    for part, where in (("train", slice(None, -HELD_OUT)), ("test", slice(-HELD_OUT, None))):
        values = {"image": rows[where], "label": digits.target[where].tolist()}
        data = datasets.Dataset.from_dict(values, features=columns)
        pq.write_table(data.data.table, folder / f"{part}.parquet", compression="zstd", compression_level=22)


def _png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    _picture(values).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def read(data: str, config_name: str | None, resolution: int) -> Labelled:
    """The train split of any data set with classes; a folder with one folder of pictures per class is one."""
    examples, _ = read_labelled_table(open_table(data, config_name=config_name), name=data)
    pixels = torch.stack([to_pixels(open_image(example.source), resolution) for example in examples])
    return ((pixels + 1) * 127.5).round().to(torch.uint8), torch.tensor([e.caption for e in examples])


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
