"""Formats, bit depths and color profiles: the colors that training sees are those that were meant."""

import importlib.util
import sys
from io import BytesIO

import numpy as np
import pytest
from helpers import icc
from PIL import Image, features

from diffadapt.common import images
from diffadapt.common.images import (
    StoredImage,
    check_images,
    open_image,
    open_undecoded,
    readable_formats,
    to_srgb,
)

HEIC_HEADER = b"\0\0\0\x18ftypheic" + bytes(100)


def managed(source):
    with open_undecoded(source) as image:
        return to_srgb(image)


def saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("color", [(200, 90, 60), (40, 200, 40), (0, 0, 255), (128, 128, 128)])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_display_p3_is_converted_for_training_and_not_for_scores(tmp_path, color, ending):
    options = {"lossless": True} if ending == "webp" else {"quality": 100}
    options = {} if ending == "png" else options
    image = Image.new("RGB", (16, 16), color)
    path = saved(tmp_path / f"a.{ending}", image, icc_profile=icc.display_p3(), **options)
    assert managed(path).getpixel((4, 4)) == pytest.approx(icc.p3_to_srgb(color), abs=2.5)
    assert open_image(path).getpixel((4, 4)) == pytest.approx(color, abs=1.5)


def test_transparency_is_white_after_a_profile_is_applied(tmp_path):
    image = Image.new("RGBA", (4, 4), (200, 90, 60, 255))
    image.putpixel((0, 0), (200, 90, 60, 0))
    path = saved(tmp_path / "a.png", image, icc_profile=icc.display_p3())
    assert managed(path).getpixel((0, 0)) == (255, 255, 255)
    assert managed(path).getpixel((1, 1)) == pytest.approx(icc.p3_to_srgb((200, 90, 60)), abs=1.5)


@pytest.mark.parametrize("image", [Image.new("L", (4, 4), 55), Image.new("LA", (4, 4), (55, 255))])
def test_a_grey_profile_is_converted(tmp_path, image):
    path = saved(tmp_path / "a.png", image, icc_profile=icc.linear_grey())
    linear = 55 / 255
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert managed(path).getpixel((1, 1)) == pytest.approx((expected,) * 3, abs=1.5)


def test_a_cmyk_profile_is_converted(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 128, 0, 0))
    path = saved(tmp_path / "a.tif", image, icc_profile=icc.neutral_cmyk())
    lightness = 100 * (1 - 128 / 255)
    linear = ((lightness + 16) / 116) ** 3
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert managed(path).getpixel((4, 4)) == pytest.approx((expected,) * 3, abs=2)


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    from PIL import ImageCms

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path / "a.png", Image.fromarray(pixels), icc_profile=profile)
    assert managed(path).tobytes() == pixels.tobytes()


@pytest.mark.parametrize("profile", [b"no profile" * 30, icc.linear_grey(), icc.neutral_cmyk(), b"\0" * 200])
def test_a_profile_that_cannot_be_used_is_ignored_with_a_notice(tmp_path, capsys, profile):
    path = saved(tmp_path / "odd.png", Image.new("RGB", (4, 4), (200, 90, 60)), icc_profile=profile)
    assert check_images([path]) == [(4, 4)]
    captured = capsys.readouterr()
    notice = captured.out + captured.err
    assert "color profiles that are ignored" in notice
    assert "odd.png: the profile is" in notice
    assert managed(path).getpixel((0, 0)) == (200, 90, 60)


def test_dark_16_bit_grey_stays_dark(tmp_path):
    values = np.full((4, 4), 109, np.uint16)
    path = saved(tmp_path / "a.png", Image.fromarray(values))
    assert open_image(path).getpixel((0, 0)) == (0, 0, 0)
    assert managed(path).getpixel((0, 0)) == (0, 0, 0)


def test_12_bit_grey_of_a_microscope_reaches_white(tmp_path):
    image = Image.fromarray(np.full((4, 4), 4095, np.uint16))
    content = BytesIO()
    image.save(content, "TIFF")
    with Image.open(content) as written:
        written.tag_v2[images.BITS_PER_SAMPLE] = (12,)
        assert images._upright(written).getpixel((0, 0)) == 255


def test_a_200_megapixel_image_is_read_and_a_bomb_is_refused():
    images._check_size((16320, 12240))
    with pytest.raises(ValueError, match=r"30000 x 30000 pixels are refused .*scale the image down"):
        images._check_size((30000, 30000))


def test_heic_without_its_package_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    readable_formats.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"phone\.heic: this is a HEIC image; pip install pillow-heif"):
            check_images([StoredImage("phone.heic", HEIC_HEADER)])
    finally:
        readable_formats.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="needs pillow-heif")
def test_heic_is_read(tmp_path):
    readable_formats()
    path = saved(tmp_path / "a.heic", Image.new("RGB", (64, 64), (200, 90, 60)), quality=95)
    assert open_image(path).getpixel((30, 30)) == pytest.approx((200, 90, 60), abs=4)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path):
    path = saved(tmp_path / "a.avif", Image.new("RGB", (64, 64), (200, 90, 60)), quality=95)
    assert open_image(path).getpixel((30, 30)) == pytest.approx((200, 90, 60), abs=4)


def test_avif_without_a_reader_names_the_remedy(monkeypatch):
    monkeypatch.setattr(images, "readable_formats", lambda: ("PNG",))
    with pytest.raises(ValueError, match=r"a\.avif: this is an AVIF image.*pip install -U pillow"):
        check_images([StoredImage("a.avif", b"\0\0\0\x18ftypavif" + bytes(100))])


def test_a_file_that_git_lfs_has_not_downloaded_is_told_apart(tmp_path):
    (tmp_path / "a.png").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match="git lfs pull"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("value", [-1, 70_000])
def test_grey_of_32_bits_beyond_16_is_refused_and_not_white(tmp_path, value):
    Image.new("I", (8, 8), value).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="do not fit into 16 bits"):
        open_image(tmp_path / "a.tif")


def test_a_damaged_image_in_memory_is_named(tmp_path):
    with pytest.raises(OSError, match="cannot identify image file 'row 3 of n'"):
        open_image(StoredImage("row 3 of n", b"no image"))
