"""Features of a set: one decode and one forward per image, a cache that knows content, refusals."""

import os

import pytest
import torch
from helpers.image_files import random_image, write_images
from toy_extractor import Toy

from diffadapt.evaluation.features import cache as cache_module
from diffadapt.evaluation.features.cache import FeatureCache
from diffadapt.evaluation.features.extraction import extract
from diffadapt.evaluation.features.extractors import load_extractor
from diffadapt.evaluation.features.feature_file import read_features
from diffadapt.evaluation.sets import image_files
from diffadapt.evaluation.sets.image_sets import open_set


@pytest.fixture
def toy():
    Toy.images_seen = 0
    return load_extractor("toy_extractor:Toy")


@pytest.fixture
def decoded(monkeypatch):
    names, original = [], image_files.open_image
    monkeypatch.setattr(
        image_files, "open_image", lambda source: names.append(str(source)) or original(source)
    )
    return names


def test_one_decode_and_one_forward_per_image_and_extractor(tmp_path, toy, decoded):
    folder = write_images(tmp_path, 7)
    clip = load_extractor("embedded:clip")
    made = extract(open_set(str(folder)), [toy, clip], batch_size=3)
    assert len(decoded) == len(set(decoded)) == 7
    assert Toy.images_seen == 7
    assert made.features["toy_extractor:Toy"]["wide"].shape == (7, 16)
    assert made.features["embedded:clip"]["image"].shape == (7, 128)
    assert [info.name for info in made.infos] == [f"image-00{i}.png" for i in range(7)]


def test_mixed_sizes_keep_their_rows_and_batches_change_nothing(tmp_path, toy):
    write_images(tmp_path, 5)
    random_image(9, (30, 20)).save(tmp_path / "image-002.png")
    images = open_set(str(tmp_path))
    whole = extract(images, [toy], batch_size=8).features[toy.name]["wide"]
    alone = [toy(image.load()[0][None])["wide"] for image in images.images]
    assert torch.allclose(whole, torch.cat(alone), atol=1e-6)
    assert torch.allclose(extract(images, [toy], batch_size=2).features[toy.name]["wide"], whole, atol=1e-6)


def test_bad_files_are_all_listed_and_left_out_only_when_told(tmp_path, toy):
    write_images(tmp_path, 5)
    whole = (tmp_path / "image-001.png").read_bytes()
    (tmp_path / "image-001.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "image-004.png").write_text("no image", encoding="utf-8")
    images = open_set(str(tmp_path))
    with pytest.raises(ValueError, match="2 of 5 images") as caught:
        extract(images, [toy], batch_size=2)
    assert "image-001.png" in str(caught.value)
    assert "image-004.png" in str(caught.value)
    made = extract(images, [toy], batch_size=2, skip_bad=True)
    assert [info.name for info in made.infos] == ["image-000.png", "image-002.png", "image-003.png"]
    assert len(made.skipped) == 2
    for index in (0, 2, 3):
        (tmp_path / f"image-00{index}.png").unlink()
    with pytest.raises(ValueError, match="no image of"):
        extract(open_set(str(tmp_path)), [toy], skip_bad=True)


def test_features_that_are_nan_name_the_image(tmp_path):
    write_images(tmp_path, 2)
    random_image(0).point(lambda _: 0).save(tmp_path / "dark.png")
    with pytest.raises(FloatingPointError, match=r"1 of 3 images .* first dark.png"):
        extract(open_set(str(tmp_path)), [load_extractor("toy_extractor:Broken")])


def test_the_cache_answers_for_the_same_content_under_any_name_and_order(tmp_path, toy, decoded):
    folder, cache = write_images(tmp_path / "a", 4), FeatureCache(tmp_path / "cache")
    first = extract(open_set(str(folder)), [toy], cache=cache)
    (folder / "image-000.png").rename(folder / "z.png")
    decoded.clear()
    second = extract(open_set(str(folder)), [toy], cache=cache)
    assert decoded == []
    assert Toy.images_seen == 4
    assert [info.name for info in second.infos] == [
        "image-001.png",
        "image-002.png",
        "image-003.png",
        "z.png",
    ]
    order = [1, 2, 3, 0]
    assert torch.equal(second.features[toy.name]["wide"], first.features[toy.name]["wide"][order])


def test_one_changed_byte_another_preset_or_version_is_made_again(tmp_path, toy, monkeypatch):
    folder, cache = write_images(tmp_path / "a", 3), FeatureCache(tmp_path / "cache")
    extract(open_set(str(folder)), [toy], cache=cache)
    data = bytearray((folder / "image-001.png").read_bytes())
    (folder / "image-001.png").write_bytes(data + b"\0")  # pixels stay, one byte more
    extract(open_set(str(folder)), [toy], cache=cache)
    assert Toy.images_seen == 6
    extract(open_set(str(folder)), [load_extractor("toy_extractor:Toy", preset="tf1")], cache=cache)
    assert Toy.images_seen == 9
    monkeypatch.setattr(cache_module, "VERSION", 99)
    extract(open_set(str(folder)), [toy], cache=cache)
    assert Toy.images_seen == 12
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("damage", ["half", "flipped", "empty"])
def test_a_torn_cache_file_is_made_again_with_a_warning(tmp_path, toy, damage):
    folder, cache = write_images(tmp_path / "a", 3), FeatureCache(tmp_path / "cache")
    made = extract(open_set(str(folder)), [toy], cache=cache)
    (path,) = (tmp_path / "cache").iterdir()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes({"half": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="extracted again"):
        again = extract(open_set(str(folder)), [toy], cache=cache)
    assert torch.equal(again.features[toy.name]["wide"], made.features[toy.name]["wide"])
    assert read_features(path).infos == made.infos


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, toy):
    blocked = tmp_path / "file"
    blocked.touch()
    folder = write_images(tmp_path / "a", 2)
    with pytest.warns(UserWarning, match="not cached"):
        made = extract(open_set(str(folder)), [toy], cache=FeatureCache(blocked / "cache"))
    assert len(made.infos) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_costs_a_warning(tmp_path, toy):
    (tmp_path / "cache").mkdir(mode=0o500)
    folder = write_images(tmp_path / "a", 2)
    with pytest.warns(UserWarning, match="not cached"):
        extract(open_set(str(folder)), [toy], cache=FeatureCache(tmp_path / "cache"))


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFADAPT_CACHE", str(tmp_path))
    assert cache_module.default_folder() == tmp_path
    monkeypatch.delenv("DIFFADAPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_module.default_folder() == tmp_path / "diffadapt" / "features"


def test_images_of_several_sizes_need_a_resize(tmp_path):
    folder = write_images(tmp_path, 3, size=(8, 8))
    write_images(tmp_path / "more", 1, first=9, size=(12, 10))
    toy = load_extractor("toy_extractor:Toy", preset="none")
    with pytest.raises(
        ValueError, match=r"--resize none needs images of one size .*8x8.*12x10 \(more/image-000"
    ):
        extract(open_set(str(folder)), [toy])
    assert len(extract(open_set(str(folder)), [load_extractor("toy_extractor:Toy")]).infos) == 4
