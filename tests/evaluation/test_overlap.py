"""Sets that share images, also mirrored or stored anew, are found; different ones are left in peace."""

import numpy as np
import pytest
from helpers.image_files import random_image, write_images
from PIL import Image, ImageOps

from diffadapt.evaluation.sets.image_sets import open_set
from diffadapt.evaluation.sets.overlap import (
    check_repeats,
    check_sets,
    lookalikes,
    mirrored_images,
    same_images,
)


def facts(folder):
    return [image.load()[1] for image in open_set(str(folder)).images]


def photograph(seed, size=(64, 64)):
    """Smooth blobs, as photographs are smooth: noise of 6 x 6 made large."""
    return random_image(seed, (6, 6)).resize(size, Image.Resampling.BICUBIC)


def check(a, b, **options):
    return check_sets(facts(a), facts(b), label="a", **{"allow_overlap": False, **options})


def test_the_same_folder_twice_is_refused(tmp_path):
    folder = write_images(tmp_path / "a", 3)
    with pytest.raises(ValueError, match="the same folder twice"):
        check(folder, folder)
    (warning,) = check(folder, folder, allow_overlap=True)
    assert "3 of 3 images are in the reference too" in warning


def test_a_mirrored_copy_of_a_set_is_refused(tmp_path):
    folder = write_images(tmp_path / "a", 3)
    (tmp_path / "b").mkdir()
    for path in folder.iterdir():
        ImageOps.mirror(Image.open(path)).save(tmp_path / "b" / path.name)
    with pytest.raises(ValueError, match="mirrored: the same folder twice"):
        check(folder, tmp_path / "b")


def test_shared_and_mirrored_images_are_counted_and_named(tmp_path):
    a, b = write_images(tmp_path / "a", 5), write_images(tmp_path / "b", 5, first=10)
    random_image(0).save(b / "other-name.bmp")  # the same pixels in another format
    ImageOps.mirror(random_image(1)).save(b / "flipped.png")
    assert same_images(facts(a), facts(b)) == [("image-000.png", "other-name.bmp")]
    assert mirrored_images(facts(a), facts(b)) == [("image-001.png", "flipped.png")]
    warnings = check(a, b)
    assert len(warnings) == 2
    assert "1 of 5 images are in the reference" in warnings[0]
    assert "image-001.png = flipped.png" in warnings[1]


def test_lookalikes_are_found_through_compression_size_and_mirror(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    for seed in range(4):
        photograph(seed).save(tmp_path / "a" / f"{seed}.png")
        photograph(seed + 10).save(tmp_path / "b" / f"{seed}.png")
    photograph(0).resize((90, 90), Image.Resampling.BICUBIC).save(tmp_path / "b" / "small.jpg", quality=90)
    ImageOps.mirror(photograph(1)).save(tmp_path / "b" / "flipped.jpg", quality=90)
    found = lookalikes(facts(tmp_path / "a"), facts(tmp_path / "b"))
    assert sorted(found) == [("0.png", "small.jpg"), ("1.png", "flipped.jpg")]


def test_flat_images_are_no_lookalikes(tmp_path):
    for name, grey in (("a", 200), ("b", 60)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(tmp_path / name / "x.png")
    assert lookalikes(facts(tmp_path / "a"), facts(tmp_path / "b")) == []


def test_symmetric_images_are_not_called_mirrored(tmp_path):
    (tmp_path / "a").mkdir()
    half = np.asarray(random_image(0))
    Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1)).save(tmp_path / "a" / "x.png")
    assert mirrored_images(facts(tmp_path / "a"), facts(tmp_path / "a")) == []


def test_jpeg_against_png_is_warned_of(tmp_path):
    a, b = write_images(tmp_path / "a", 3, suffix=".jpg"), write_images(tmp_path / "b", 3, first=9)
    (warning,) = check(a, b)
    assert "100% of the generated and 0% of the reference images are lossy" in warning
    assert check(write_images(tmp_path / "c", 3, first=5), b) == []


def test_repeats_within_a_set(tmp_path):
    folder = write_images(tmp_path, 3)
    assert check_repeats(facts(folder), label="a") == []
    random_image(0).save(folder / "again.png")
    (warning,) = check_repeats(facts(folder), label="a")
    assert "1 of 4 images repeat other images" in warning
