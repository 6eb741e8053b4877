"""Distances among the images of one prompt, without keeping the features they are taken in."""

import pytest
import torch
from helpers.image_files import write_images

from diffadapt.evaluation.features.extraction import extract
from diffadapt.evaluation.features.extractors.base import Extractor
from diffadapt.evaluation.features.prompt_groups import coordinates, prompt_batches
from diffadapt.evaluation.sets.image_sets import ImageSet, open_set

PROMPTS = ("x", "y", "x", "z", "y", "x", "x")  # not in order, "x" has more images than a batch


def test_batches_hold_all_images_of_their_prompts():
    assert prompt_batches(5, 2) == [[0, 1], [2, 3], [4]]
    assert prompt_batches(7, 3, PROMPTS) == [[0, 2, 5, 6], [1, 4, 3]]
    assert prompt_batches(4, 2, ("a", "b", "c", "c")) == [[0, 1], [2, 3]]


def test_coordinates_keep_the_distances_within_a_prompt(monkeypatch):
    monkeypatch.setattr("diffadapt.evaluation.features.prompt_groups.COLUMNS", 7)
    rows = 1e-3 * torch.randn(5, 40) + 10  # what the rows share is far larger than what they differ by
    found = coordinates(rows, ["a", "b", "a", "a", "b"])
    assert found.shape == (5, 3)
    for first, second in ((0, 2), (0, 3), (2, 3), (1, 4)):
        expected = (rows[first].double() - rows[second].double()).square().sum()
        assert (found[first] - found[second]).square().sum() == pytest.approx(float(expected), rel=1e-9)


def test_a_row_that_is_not_finite_stays_so():
    rows = torch.randn(4, 6)
    rows[1, 2] = torch.nan
    found = coordinates(rows, ["a", "a", "b", "b"])
    assert found.isfinite().all(dim=1).tolist() == [True, False, True, True]


@pytest.fixture
def perceptual():
    """Pixels as features, all of them compared; remembers how many images it was given at a time."""
    sizes = []

    def network(pixels):
        sizes.append(len(pixels))
        return {"lpips": pixels.flatten(1)}

    made = Extractor("lpips:toy", "", 8, "clean", ("lpips",), None, network, perceptual_layer="lpips")
    return made, sizes


def plain():
    return Extractor("plain", "", 8, "clean", ("wide",), "wide", lambda pixels: {"wide": pixels.flatten(1)})


def test_a_set_keeps_its_order_and_few_numbers_of_each_image(tmp_path, perceptual):
    lpips, sizes = perceptual
    lazy_images = open_set(str(write_images(tmp_path, len(PROMPTS)))).images
    made = extract(ImageSet("a", "adapter", lazy_images, prompts=PROMPTS), [lpips, plain()], batch_size=3)
    assert [info.name for info in made.infos] == [image.name for image in lazy_images]
    assert sorted(sizes) == [1, 3, 3]  # the four of "x" went through in two parts
    rows, few = made.features["plain"]["wide"].double(), made.features["lpips:toy"]["lpips"]
    assert few.shape == (7, 4)
    for first, second in ((0, 2), (2, 6), (1, 4)):
        expected = (rows[first] - rows[second]).square().sum()
        assert (few[first] - few[second]).square().sum() == pytest.approx(float(expected), rel=1e-6)


def test_unreadable_images_are_left_out_of_their_prompt(tmp_path, perceptual):
    write_images(tmp_path, len(PROMPTS))
    (tmp_path / "image-002.png").write_text("no image", encoding="utf-8")
    images = ImageSet("a", "adapter", open_set(str(tmp_path)).images, prompts=PROMPTS)
    made = extract(images, [perceptual[0]], batch_size=3, skip_bad=True)
    assert made.features["lpips:toy"]["lpips"].shape == (6, 3)
    assert [info.name[6:9] for info in made.infos] == ["000", "001", "003", "004", "005", "006"]


def test_without_prompts_there_is_nothing_to_compare_and_no_forward(tmp_path, perceptual):
    lpips, sizes = perceptual
    made = extract(open_set(str(write_images(tmp_path, 3))), [lpips, plain()])
    assert list(made.features) == ["plain"]
    assert sizes == []
    assert len(extract(open_set(str(tmp_path)), [lpips]).infos) == 3  # for overlap with other sets
