"""Measures the CPU seconds of reading images in a training step, for small files and for camera photos.

    python eval/benchmarks/data_speed.py

Every file is a JPEG of random smooth content. The first epoch decodes it, later ones take its scaled copy
from memory. "without copies" is the cost of a set that does not fit into memory, "all of the file" the cost
of decoding it at its full size.
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

GRAIN = 4  # pixels of a file per random value, for as much detail as photographs have


def write_photos(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Writes JPEG files of a size (width, height)."""
    width, height = size
    paths = []
    for index in range(count):
        generator = np.random.default_rng(index)
        coarse = generator.integers(0, 256, (height // GRAIN + 1, width // GRAIN + 1, 3), np.uint8)
        path = folder / f"{width}x{height}-{index}.jpg"
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(path)
    return paths


def cpu_seconds(read: Callable[[ImageSource], Image.Image], paths: list[Path], resolution: int) -> float:
    """CPU seconds of reading and cropping all files once, as a batch.

    Args:
        read: reads one file.
        paths: the files.
        resolution: height and width of the crops.
    """
    start = time.process_time()
    for index, path in enumerate(paths):
        to_pixels(read(path), resolution, crop=(index / len(paths), 0.5))
    return time.process_time() - start


def measure(paths: list[Path], resolution: int) -> dict[str, float]:
    """CPU seconds of a step, by the source of its images."""
    size = (resolution, resolution)
    images = ScaledImages(IMAGE_MEMORY)

    def read_cached(path: ImageSource) -> Image.Image:
        return images.get(path, size).image

    return {
        "all of the file": cpu_seconds(open_image, paths, resolution),
        "first epoch": cpu_seconds(read_cached, paths, resolution),
        "later epochs": cpu_seconds(read_cached, paths, resolution),
        "without copies": cpu_seconds(lambda path: read_scaled(path, size).image, paths, resolution),
    }


def main() -> None:
    """Measures files of each size and prints the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=4, help="files per step (default: 4)")
    parser.add_argument("--resolution", type=int, default=512, help="side of training images (default: 512)")
    parser.add_argument(
        "--sizes", nargs="+", default=["1200x800", "6000x4000"], help="WIDTHxHEIGHT of the files"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for text in arguments.sizes:
            width_text, _, height_text = text.partition("x")
            size = (int(width_text), int(height_text))
            paths = write_photos(Path(folder), size, arguments.batch_size)
            seconds = measure(paths, arguments.resolution)
            results = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
            print(f"{arguments.batch_size} files of {size[0]} x {size[1]}: {results}")


if __name__ == "__main__":
    main()
