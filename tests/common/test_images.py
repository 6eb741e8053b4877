"""Every kind of picture is read right; what cannot be read is named before training."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from diffadapt.common.images import (
    StoredImage,
    check_images,
    crop_geometry,
    list_images,
    open_image,
    to_pixels,
)


def saved(path, array, mode=None, **options):
    Image.fromarray(np.asarray(array), mode).save(path, **options)
    return path


def test_transparency_becomes_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, :] = (255, 0, 0, 255)
    image = open_image(saved(tmp_path / "a.png", rgba))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert image.getpixel((0, 3)) == (255, 255, 255)


def test_palette_with_a_transparent_colour_becomes_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "a.png", transparency=0)
    read = open_image(tmp_path / "a.png")
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert read.getpixel((1, 1)) == (200, 0, 0)


def test_16_bit_grey_keeps_its_greys(tmp_path):
    image = open_image(saved(tmp_path / "a.png", np.array([[0, 32768], [65535, 16384]], np.uint16)))
    assert [image.getpixel((x, y))[0] for y in (0, 1) for x in (0, 1)] == [0, 128, 255, 64]


def test_a_camera_s_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    pixels = np.zeros((8, 16, 3), np.uint8)
    assert open_image(saved(tmp_path / "a.jpg", pixels, exif=exif)).size == (8, 16)


@pytest.mark.parametrize(
    ("mode", "value"), [("L", 128), ("CMYK", (0, 0, 0, 127)), ("LA", (128, 255)), ("1", 1)]
)
def test_other_colour_models_become_rgb(tmp_path, mode, value):
    image = Image.new(mode, (4, 4), value)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    assert open_image(path).mode == "RGB"
    assert open_image(path).getpixel((1, 1)) in [(128,) * 3, (255,) * 3]


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_unreadable_files_are_all_listed(tmp_path):
    saved(tmp_path / "good.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    whole = saved(tmp_path / "cut.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    whole.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"2 of 3 images cannot be read(.|\n)*cut.png(.|\n)*text.png"):
        check_images(list_images(tmp_path))


def test_an_empty_folder_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"no images in .* expected files ending in"):
        list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        list_images(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [(1, 1), (50, 20), (20, 50), (333, 100)])
def test_any_size_becomes_a_square_in_the_range_of_the_autoencoder(size):
    pixels = to_pixels(Image.new("RGB", size, (255, 0, 128)), 32)
    assert pixels.shape == (3, 32, 32)
    assert torch.allclose(pixels[:, 0, 0], torch.tensor([1.0, -1.0, 128 / 127.5 - 1]), atol=1e-6)


def test_the_crop_says_where_the_square_lies():
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (32, 0, 64, 32))
    assert to_pixels(image, 32, crop=(0.0, 0.5)).max() == -1
    assert to_pixels(image, 32, crop=(1.0, 0.5)).min() == 1
    assert to_pixels(image, 32, crop=(1.0, 0.5), flip=True).min() == 1
    assert to_pixels(image, 32, crop=(0.5, 0.5)).mean() == pytest.approx(0, abs=0.1)


def test_decompression_bombs_are_refused_by_name_before_they_are_unpacked(tmp_path, monkeypatch):
    header = struct.pack(">II5B", 30_000, 30_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(ValueError, match=r"bomb.png: .*(900000000 pixels|decompression bomb)"):
        check_images([tmp_path / "bomb.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # whatever a program does to Pillow's own limit
    with pytest.raises(ValueError, match=r"bomb.png: 30000 x 30000 pixels are refused"):
        check_images([tmp_path / "bomb.png"])


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_text(script, encoding="utf-8")
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: started.append(given))
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "EPS"  # what Pillow would take it for
    with pytest.raises(ValueError, match=r"a\.png: cannot identify image file"):
        check_images(list_images(tmp_path))
    assert not started


def test_a_thread_of_pixels_is_listed(tmp_path):
    Image.new("RGB", (1, 5000)).save(tmp_path / "thread.png")
    with pytest.raises(ValueError, match=r"thread.png: 1 x 5000 pixels: one side is more than 32 times"):
        check_images([tmp_path / "thread.png"])


@pytest.mark.parametrize("kind", ["jpg", "webp", "gif", "tif", "bmp", "png"])
def test_files_cut_anywhere_are_listed_and_never_crash(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    whole = saved(tmp_path / f"whole.{kind}", pixels).read_bytes()
    for cut in range(0, len(whole), max(1, len(whole) // 12)):
        (tmp_path / f"cut-{cut}.{kind}").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"images cannot be read; remove or repair them:\n .*cut-0"):
        check_images(list_images(tmp_path))


def test_links_out_of_the_folder_are_listed_and_links_within_are_followed(tmp_path):
    saved(tmp_path / "secret.png", np.zeros((4, 4, 3), np.uint8))
    folder = tmp_path / "data"
    folder.mkdir()
    saved(folder / "a.png", np.zeros((4, 4, 3), np.uint8))
    (folder / "b.png").symlink_to(folder / "a.png")
    assert len(list_images(folder)) == 2
    (folder / "c.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=r"links out of .*data(.|\n)*c.png"):
        list_images(folder)


def test_pictures_in_memory_are_read_like_files(tmp_path):
    path = saved(tmp_path / "a.png", np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    stored = StoredImage("the first", path.read_bytes())
    assert open_image(stored).tobytes() == open_image(path).tobytes()
    with pytest.raises(ValueError, match="the second: "):
        check_images([stored, StoredImage("the second", b"no picture")])


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (100, 70), (32, 32)])
@pytest.mark.parametrize("crop", [(0.0, 0.0), (0.5, 0.5), (1.0, 0.3)])
def test_a_view_says_what_was_cut(size, crop):
    """A picture whose colours are its coordinates shows where the cut lies, mirrored or not."""
    width, height = size
    values = np.zeros((height, width, 3), np.uint8)
    values[..., 0], values[..., 1] = np.arange(width), np.arange(height)[:, None]
    target = (height // 2, width // 2) if min(size) > 32 else (min(size), min(size))
    for flip in (False, True):
        view = crop_geometry(size, target, crop=crop, flip=flip)
        assert view.original_size == (height, width)
        assert view.size == target
        source = values[:, ::-1] if flip else values
        if min(size) == 32:  # not scaled: pixels can be compared
            top, left = view.crop
            expected = source[top : top + 32, left : left + 32]
            found = (to_pixels(Image.fromarray(values), target, crop=crop, flip=flip) + 1) * 127.5
            assert np.array_equal(found.round().byte().permute(1, 2, 0).numpy(), expected)


def test_a_part_of_another_shape_keeps_the_shape_of_things():
    image = Image.new("RGB", (120, 60), "black")
    image.paste("white", (60, 0, 120, 60))
    pixels = to_pixels(image, (16, 32))
    assert pixels.shape == (3, 16, 32)
    assert pixels[:, :, :14].max() < -0.9
    assert pixels[:, :, 18:].min() > 0.9
