"""CPU seconds that reading images costs in a training step, for small files and for a camera's.

    python eval/benchmarks/data_speed.py

Every file is a JPEG of random smooth content. The first epoch decodes it, later ones take its scaled copy
from memory; "without copies" is what a set costs that does not fit into memory, "all of the file" what it
would cost to decode it at its full size.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffadapt.common.images import ImageSource, open_image, to_pixels
from diffadapt.data.scaled_images import IMAGE_MEMORY, ScaledImages, read_scaled

GRAIN = 4  # pixels of a file for each random value: detail as photographs have it


def write_photos(folder: Path, side: tuple[int, int], count: int) -> list[Path]:
    """JPEG files of a size (width, height)."""
    width, height = side
    paths = []
    for index in range(count):
        random = np.random.default_rng(index)
        coarse = random.integers(0, 256, (height // GRAIN + 1, width // GRAIN + 1, 3), np.uint8)
        path = folder / f"{width}x{height}-{index}.jpg"
        Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(path)
    return paths


def cpu_seconds(read: Callable[[ImageSource], Image.Image], paths: list[Path], resolution: int) -> float:
    """Of reading and cutting all of the files once, as a batch."""
    started = time.process_time()
    for index, path in enumerate(paths):
        to_pixels(read(path), resolution, crop=(index / len(paths), 0.5))
    return time.process_time() - started


def measure(paths: list[Path], resolution: int) -> dict[str, float]:
    """CPU seconds of a step, by where its images come from."""
    size = (resolution, resolution)
    images = ScaledImages(IMAGE_MEMORY)

    def keeping(path: ImageSource) -> Image.Image:
        return images.get(path, size).image

    return {
        "all of the file": cpu_seconds(open_image, paths, resolution),
        "first epoch": cpu_seconds(keeping, paths, resolution),
        "later epochs": cpu_seconds(keeping, paths, resolution),
        "without copies": cpu_seconds(lambda path: read_scaled(path, size).image, paths, resolution),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=4, help="files of a step (default: 4)")
    parser.add_argument("--resolution", type=int, default=512, help="training size (default: 512)")
    parser.add_argument(
        "--sizes", nargs="+", default=["1200x800", "6000x4000"], help="WIDTHxHEIGHT of the files"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for text in arguments.sizes:
            width, height = (int(side) for side in text.split("x"))
            paths = write_photos(Path(folder), (width, height), arguments.batch_size)
            figures = measure(paths, arguments.resolution)
            shown = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in figures.items())
            print(f"{arguments.batch_size} files of {width} x {height}: {shown}")


if __name__ == "__main__":
    main()
