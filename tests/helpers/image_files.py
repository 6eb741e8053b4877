"""Image files for tests: small random images, the same for the same seed."""

import numpy as np
from PIL import Image


def random_image(seed, size=(12, 10), mode="RGB"):
    """(width, height) of noise over a smooth ramp, so that no two look alike."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def write_images(folder, count, *, first=0, suffix=".png", size=(12, 10)):
    """count files image-000.png, ... of seeds first, first + 1, ...; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        random_image(first + index, size).save(folder / f"image-{index:03d}{suffix}")
    return folder
