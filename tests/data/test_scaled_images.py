"""Large images cost their decoding once, and are the same however they are read."""

import numpy as np
import pytest
from PIL import Image

from diffadapt.common import images
from diffadapt.common.images import check_images, open_image, to_pixels
from diffadapt.data import scaled_images
from diffadapt.data.scaled_images import ScaledImages, read_scaled

ON_ITS_SIDE = 6  # EXIF orientation


def photo(path, size, *, orientation=None, **options):
    """Smooth colors, as photographs have them: width along red, height along green."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_formats_without_draft_keep_their_pixels(tmp_path, ending):
    path = photo(tmp_path / f"a.{ending}", (300, 200))
    assert to_pixels(read_scaled(path, (32, 32)).image, 32).equal(to_pixels(open_image(path), 32))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_a_turned_image_of_any_format_keeps_its_shape(tmp_path, ending, orientation):
    path = photo(tmp_path / f"a.{ending}", (64, 32), orientation=orientation)
    upright = (32, 64) if orientation > 4 else (64, 32)
    scaled = read_scaled(path, (16, 16))
    assert scaled.original_size == upright
    assert scaled.image.size == (upright[0] // 2, upright[1] // 2)
    assert check_images([path]) == [upright]


@pytest.mark.parametrize("size", [(60, 40), (64, 64), (125, 90), (33, 40)])
def test_a_jpeg_up_to_four_times_the_size_keeps_its_pixels(tmp_path, size):
    path = photo(tmp_path / "a.jpg", size)
    assert to_pixels(read_scaled(path, (32, 32)).image, 32).equal(to_pixels(open_image(path), 32))


@pytest.mark.parametrize("orientation", [None, ON_ITS_SIDE])
@pytest.mark.parametrize("size", [(1201, 803), (803, 1201)])
def test_a_large_jpeg_is_reduced_while_it_is_decoded(tmp_path, monkeypatch, orientation, size):
    path = photo(tmp_path / "a.jpg", size, orientation=orientation, quality=95)
    expected = to_pixels(open_image(path), (32, 48), crop=(1.0, 0.3))
    unpacked = []
    original = scaled_images.to_srgb
    monkeypatch.setattr(
        scaled_images, "to_srgb", lambda image: unpacked.append(image.size) or original(image)
    )
    scaled = read_scaled(path, (32, 48))
    upright = size[::-1] if orientation else size
    assert scaled.original_size == upright
    assert unpacked[0][0] < size[0] / 3
    assert min(scaled.image.size) >= 32
    assert (to_pixels(scaled.image, (32, 48), crop=(1.0, 0.3)) - expected).abs().max() < 0.05


def test_kept_read_ahead_and_read_now_are_the_same_image(tmp_path):
    paths = [photo(tmp_path / f"{i}.jpg", (800 + 16 * i, 600)) for i in range(3)]
    expected = [read_scaled(path, (32, 32)).image.tobytes() for path in paths]
    keeping, reading = ScaledImages(memory=10**6), ScaledImages(memory=0)
    reading.read_ahead([(path, (32, 32)) for path in paths])
    for scaled in (keeping, keeping, reading, reading):
        assert [scaled.get(path, (32, 32)).image.tobytes() for path in paths] == expected


def test_a_kept_image_is_not_decoded_again_and_memory_is_bounded(tmp_path, monkeypatch):
    paths = [photo(tmp_path / f"{i}.png", (64, 64)) for i in range(3)]
    names = []
    original = scaled_images.read_scaled
    monkeypatch.setattr(
        scaled_images, "read_scaled", lambda path, size: names.append(path.name) or original(path, size)
    )
    keeping = ScaledImages(memory=2 * 3 * 32 * 32)
    for _ in range(2):
        for path in paths:
            keeping.get(path, (32, 32))
    assert names == ["0.png", "1.png", "2.png", "2.png"]


def test_checking_a_large_jpeg_reads_all_of_it_without_making_all_pixels(tmp_path, monkeypatch):
    path = photo(tmp_path / "a.jpg", (1200, 800), orientation=ON_ITS_SIDE)
    unpacked = []
    original = images._to_srgb
    monkeypatch.setattr(images, "_to_srgb", lambda image: unpacked.append(image.size) or original(image))
    assert check_images([path]) == [(800, 1200)]
    assert unpacked == [(150, 100)]
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"1 of 1 .*cannot be read(.|\n)*truncated"):
        check_images([path])


def test_a_damaged_image_raises_when_it_is_asked_for(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    reading = ScaledImages(memory=0)
    reading.read_ahead([(tmp_path / "a.png", (32, 32))])
    with pytest.raises(OSError, match="cannot identify"):
        reading.get(tmp_path / "a.png", (32, 32))
