"""Image sets of every kind: what is read, in which order, and what is refused."""

import io
import json
import zipfile

import numpy as np
import pytest
from helpers.image_files import random_image, write_images
from PIL import Image, ImageCms

from diffadapt.evaluation.sets import archives
from diffadapt.evaluation.sets.image_files import ImageFile, to_uint8
from diffadapt.evaluation.sets.image_sets import fingerprint, open_set
from diffadapt.evaluation.sets.set_warnings import (
    conversions_warning,
    excluded_images_warning,
    odd_sizes_warning,
)


def png(seed):
    buffer = io.BytesIO()
    random_image(seed).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(images):
    return [image.load()[0].permute(1, 2, 0).numpy() for image in images.images]


def test_folder_zip_npz_and_dataset_hold_the_same_images(tmp_path):
    import datasets

    folder = write_images(tmp_path / "folder", 3)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(folder.iterdir(), reverse=True):
            archive.write(path, f"inner/{path.name}")
        archive.writestr("notes.txt", "no image")
    arrays = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    np.savez(tmp_path / "set.npz", arrays)
    rows = {"image": [str(path) for path in sorted(folder.iterdir())]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    names = ["folder", "set.zip", "set.npz", "saved"]
    sets = [open_set(str(tmp_path / name)) for name in names] + [open_set(f"datasets:{tmp_path / 'saved'}")]
    assert [images.kind for images in sets] == ["folder", "zip", "npz", "datasets", "datasets"]
    for images in sets:
        assert all(np.array_equal(a, b) for a, b in zip(pixels(images), arrays, strict=True))
    assert [p.name for p in sets[1].images] == [f"inner/image-00{i}.png" for i in range(3)]
    with pytest.raises(ValueError, match="no image column 'picture'"):
        open_set(f"datasets:{tmp_path / 'saved'}::picture")


def test_folders_in_folders_are_read_and_other_files_listed(tmp_path):
    write_images(tmp_path / "a", 1)
    write_images(tmp_path / "b", 1, first=1)
    (tmp_path / "notes.txt").write_text("not an image", encoding="utf-8")
    images = open_set(str(tmp_path))
    assert [p.name for p in images.images] == ["a/image-000.png", "b/image-000.png"]
    assert images.ignored == ("notes.txt: not an image file",)


def test_a_folder_of_diffadapt_sample_is_its_images_with_their_prompts(tmp_path):
    write_images(tmp_path, 3)
    random_image(9).save(tmp_path / "sheet.png")
    images = [{"file": f"image-00{i}.png", "prompt": f"prompt {i}"} for i in (2, 0)]
    (tmp_path / "sample.json").write_text(json.dumps({"images": images}), encoding="utf-8")
    found = open_set(str(tmp_path))
    assert [image.name for image in found.images] == ["image-002.png", "image-000.png"]
    assert found.prompts == ("prompt 2", "prompt 0")
    (tmp_path / "sample.json").write_text(
        json.dumps({"images": [{"file": "../x.png", "prompt": ""}]}), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="not in its folder"):
        open_set(str(tmp_path))
    (tmp_path / "sample.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged"):
        open_set(str(tmp_path))


def test_embedded_sets():
    assert len(open_set("embedded:style/fluent3d/held_out")) == 200
    handwriting = open_set("embedded:handwriting:test")
    assert len(handwriting) == 397
    assert handwriting.images[0].load()[0].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="no split 'tset'; did you mean test"):
        open_set("embedded:handwriting:tset")


@pytest.mark.parametrize(
    ("name", "message"),
    [("/nowhere", "no images at"), ("set.csv", "is no set of images"), ("empty", "no images in")],
)
def test_what_is_no_set_is_named(tmp_path, name, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set.csv").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_set(name)


def test_bombs_and_names_that_lead_out_of_a_zip_are_refused(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.png", bytes(8 << 20))
    with pytest.raises(ValueError, match="refused as a decompression bomb"):
        open_set(str(path))
    for name in ("../out.png", "/etc/out.png", "a\\..\\..\\out.png"):
        with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
            archive.writestr(name, png(0))
        with pytest.raises(ValueError, match="leads out of it"):
            open_set(str(tmp_path / "out.zip"))
    (tmp_path / "torn.zip").write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="no readable archive"):
        open_set(str(tmp_path / "torn.zip"))


def test_a_zip_whose_list_lies_about_sizes_is_not_read_further(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", png(0))
    (member,) = archives.zip_images(tmp_path / "set.zip")
    monkeypatch.setattr(member.info, "file_size", 10)
    with pytest.raises((ValueError, zipfile.BadZipFile)):
        member.read_bytes()


def test_npz_is_never_unpickled_and_bombs_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="cannot be read as arrays"):
        open_set(str(tmp_path / "objects.npz"))
    np.savez_compressed(tmp_path / "zeros.npz", np.zeros((400, 100, 100, 3), np.uint8))
    with pytest.raises(ValueError, match="refused as a decompression bomb"):
        open_set(str(tmp_path / "zeros.npz"))
    np.savez(tmp_path / "other.npz", features=np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"features \(3, 4\); expected images .* under 'arr_0'"):
        open_set(str(tmp_path / "other.npz"))


def test_floats_are_rounded_once_to_the_nearest():
    values = np.array([0.0, 0.499 / 255, 0.501 / 255, 0.999, 1.0]).reshape(1, 1, 5, 1)
    assert to_uint8(values, "x")[0][0, :, 0].tolist() == [0, 0, 1, 255, 255]


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (-1.0, 1.0, "look like"),
        (0.0, 255.0, "divide by 255"),
        (0.0, 1.5, "rescale"),
        (0.0, np.nan, "NaN or infinity"),
    ],
)
def test_floats_out_of_range_are_refused(low, high, message):
    values = np.full((1, 4, 4, 3), 0.5)
    values[0, 0, 0, 0], values[0, 1, 1, 0] = low, high
    with pytest.raises(ValueError, match=message):
        to_uint8(values, "x")


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match="got int64"):
        to_uint8(np.zeros((1, 4, 4, 3), np.int64), "x")
    with pytest.raises(ValueError, match=r"shape \(4, 4, 3\)"):
        to_uint8(np.zeros((4, 4, 3), np.uint8), "x")


def test_modes_become_rgb_and_are_remembered(tmp_path):
    for mode in ("L", "RGBA", "P", "1"):
        random_image(0, mode=mode).save(tmp_path / f"{mode}.png")
    found = {p.name: p.load() for p in open_set(str(tmp_path)).images}
    assert {facts.mode for _, facts in found.values()} == {"L", "RGBA", "P", "1"}
    assert all(image.shape == (3, 10, 12) for image, _ in found.values())


def test_a_float_tiff_out_of_range_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 7.0, np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        ImageFile("x", tmp_path / "x.tiff").load()


def test_fingerprints_know_content_not_names_or_order():
    assert fingerprint(["a", "b"]) == fingerprint(["b", "a"]) != fingerprint(["a", "b", "b"])


@pytest.mark.parametrize("name", ["images.npy", "images.npz"])
@pytest.mark.parametrize("is_channels_first", [False, True])
def test_arrays_under_any_name_and_with_channels_first_are_read(tmp_path, name, is_channels_first):
    values = np.random.default_rng(0).integers(0, 256, (4, 8, 6, 3), dtype=np.uint8)
    stored = values.transpose(0, 3, 1, 2) if is_channels_first else values
    if name.endswith("npy"):
        np.save(tmp_path / name, stored)
    else:
        np.savez(tmp_path / name, samples=stored, labels=np.arange(4))
    np.testing.assert_array_equal(np.stack(pixels(open_set(str(tmp_path / name)))), values)


def test_two_arrays_of_images_and_a_pickle_are_refused(tmp_path):
    values = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "two.npz", a=values, b=values)
    with pytest.raises(ValueError, match=r"holds a \(2, 8, 8, 3\), b \(2, 8, 8, 3\)"):
        open_set(str(tmp_path / "two.npz"))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="cannot be read as an array"):
        open_set(str(tmp_path / "objects.npy"))


def test_overviews_and_inputs_in_a_folder_of_results_are_left_out_and_named(tmp_path):
    write_images(tmp_path, 5)
    write_images(tmp_path / "input", 1)
    for name in ("grid.png", "samples_grid-0012.png", "sheet.png"):
        random_image(1, (60, 12)).save(tmp_path / name)
    images = open_set(str(tmp_path))
    assert [image.name for image in images.images] == [f"image-{i:03d}.png" for i in range(5)]
    assert set(images.excluded) == {
        "grid.png",
        "input/image-000.png",
        "samples_grid-0012.png",
        "sheet.png",
    }
    (warning,) = excluded_images_warning("a", images)
    assert "4 images are not scored" in warning
    assert "grid.png" in warning
    assert len(open_set(str(tmp_path / "input"))) == 1  # named itself, it is what is wanted


def test_the_folders_of_a_run_and_of_an_evaluation_name_the_sets_in_them(tmp_path):
    run = tmp_path / "run"
    write_images(run / "samples" / "after", 2)
    (run / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--run .*run, or name .*samples/after"):
        open_set(str(run))
    evaluation = tmp_path / "evaluation"
    write_images(evaluation / "images" / "base" / "cat", 2)
    (evaluation / "subject.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"name a set of them: .*images/base"):
        open_set(str(evaluation))


def test_a_few_images_of_another_size_are_named(tmp_path):
    write_images(tmp_path, 12)
    random_image(50, (60, 20)).save(tmp_path / "preview.png")
    facts = [image.load()[1] for image in open_set(str(tmp_path)).images]
    (warning,) = odd_sizes_warning("a", facts)
    assert "1 of 13 images do not have 12x10 pixels" in warning
    assert "preview.png" in warning
    assert odd_sizes_warning("a", facts[:-1]) == []


def test_conversions_that_other_programs_do_not_make_are_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(0).save(tmp_path / "turned.jpg", exif=exif)
    clear = random_image(1, mode="RGBA")
    clear.putalpha(100)
    clear.save(tmp_path / "clear.png")
    random_image(2, mode="RGBA").save(tmp_path / "opaque.png")
    random_image(3).quantize(8).save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(np.arange(120, dtype=np.uint16).reshape(10, 12) * 500).save(tmp_path / "deep.png")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    random_image(4).save(tmp_path / "profile.png", icc_profile=profile)
    facts = [image.load()[1] for image in open_set(str(tmp_path)).images]
    counts = {each.name: each.conversions for each in facts}
    assert counts == {
        "turned.jpg": ("turned upright by their EXIF orientation",),
        "clear.png": ("transparent, put on white",),
        "opaque.png": (),
        "palette.png": ("transparent, put on white",),
        "deep.png": ("of more than 8 bits",),
        "profile.png": ("with an ICC profile",),
    }
    (warning,) = conversions_warning("a", facts)
    assert "of 6 images" in warning
    assert "2 transparent, put on white" in warning
