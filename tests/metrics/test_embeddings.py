"""Metrics on embeddings: cosines of images and texts, CLIPScore, copies, Vendi."""

import pytest
import torch
from helpers.feature_sets import gaussian_sets
from torch.nn.functional import interpolate, normalize
from transformers import CLIPProcessor

from diffadapt.evaluation.features.extractors import load_extractor
from diffadapt.metrics import clip_score, copy_rate, nearest_images, vendi
from diffadapt.metrics.copying import copy_threshold
from diffadapt.metrics.features import load_clip
from diffadapt.metrics.similarity import (
    ceiling_similarity,
    image_similarities,
    mean_similarity,
    text_similarities,
)
from diffadapt.metrics.vendi import vendi_with_interval


def test_image_similarity_is_the_mean_cosine_of_all_pairs():
    real, generated = gaussian_sets(5, 4)
    cosines = [torch.nn.functional.cosine_similarity(row, real).mean() for row in generated]
    assert torch.allclose(image_similarities(real=real, generated=generated), torch.stack(cosines))
    assert mean_similarity(generated=generated, real=real) == pytest.approx(float(sum(cosines)) / 4)


def test_ceiling_leaves_out_each_image_itself():
    real, _ = gaussian_sets(5)
    cosines = [
        float(torch.nn.functional.cosine_similarity(real[i], real[j], dim=0))
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert ceiling_similarity(real=real) == pytest.approx(sum(cosines) / 20)


def test_text_similarity_pairs_rows():
    images, texts = gaussian_sets(6, 6)
    expected = torch.nn.functional.cosine_similarity(images, texts)
    assert torch.allclose(text_similarities(images=images, texts=texts), expected)
    with pytest.raises(ValueError, match="one text embedding per image"):
        text_similarities(images=images, texts=texts[:5])


def test_clip_score_is_a_hundred_times_the_cosine_of_the_stock_model():
    clip = load_clip("embedded:clip")
    side = clip.model.config.vision_config.image_size
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    texts = ["a red cat", "two blue cars", "a house"]
    prepared = CLIPProcessor(clip.processor, clip.tokenizer)(
        text=texts, images=list(images), return_tensors="pt", padding="max_length"
    )
    with torch.no_grad():
        outcome = clip.model(input_ids=prepared.input_ids, pixel_values=prepared.pixel_values)
    cosines = (outcome.image_embeds * outcome.text_embeds).sum(dim=1)
    found = clip_score(images=images, texts=texts, model=clip)
    assert found == pytest.approx(max(0.0, 100 * float(cosines.mean())), abs=1e-3)
    assert clip_score(images=(images.float() / 255).split(2), texts=texts, model=clip) == pytest.approx(found)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (100, 200), (333, 77), (300, 512)])
def test_clip_score_crops_the_middle_as_the_stock_processor_does(size):
    clip = load_clip("embedded:clip")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (2, 3, 8, 8), generator=generator).float()
    images = interpolate(coarse, size, mode="bilinear").round().to(torch.uint8)
    texts = ["a red cat", "two blue cars"]
    found = clip_score(images=images, texts=texts, model=clip)
    extractor = load_extractor("embedded:clip")
    cosines = text_similarities(images=extractor(images)["image"], texts=extractor.embed_texts(texts))
    assert found == pytest.approx(max(0.0, 100 * float(cosines.mean())), abs=1e-3)
    pixels = clip.processor(images=list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        hidden = clip.model.vision_model(pixel_values=pixels).pooler_output
        stock = clip.model.visual_projection(hidden)
    expected = text_similarities(images=stock, texts=clip.texts(texts))
    assert found == pytest.approx(max(0.0, 100 * float(expected.mean())), abs=0.1)  # it rounds to levels


def test_clip_score_refuses_what_does_not_fit():
    clip = load_clip("embedded:clip")
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="2 images, but 1 texts"):
        clip_score(images=images, texts=["a cat"], model=clip)
    with pytest.raises(ValueError, match=r"values in \[0, 1\], got -1"):
        clip_score(images=images - 1, texts=["a", "b"], model=clip)


@pytest.mark.parametrize("rows", [1024, 2])  # at a time
def test_copies_are_found_mirrored_too(rows, monkeypatch):
    monkeypatch.setattr("diffadapt.metrics.copying.ROWS", rows)
    training, generated = gaussian_sets(5, 4, width=30)
    mirrored = gaussian_sets(5, width=30, seed=9)[0]
    generated[1], generated[2] = training[3] * 2, mirrored[4] + 0.01
    found = nearest_images(generated=generated, training=training, mirrored=mirrored)
    assert found.index[1:3].tolist() == [3, 4]
    assert found.is_mirrored[1:3].tolist() == [False, True]
    assert float(found.similarity[1]) == pytest.approx(1)
    assert copy_rate(generated=generated, training=training, threshold=0.9) == 0.25
    assert copy_rate(generated=generated, training=training, mirrored=mirrored, threshold=0.9) == 0.5


@pytest.mark.parametrize("rows", [1024, 2])  # at a time
def test_threshold_is_the_likeness_of_training_images(rows, monkeypatch):
    monkeypatch.setattr("diffadapt.metrics.copying.ROWS", rows)
    training, generated = gaussian_sets(5, 4)
    cosines = normalize(training) @ normalize(training).T
    expected = float(cosines.fill_diagonal_(-1).max())
    assert copy_threshold(training=training) == pytest.approx(expected)
    twice = torch.cat([training, training[:1]])  # the same picture again is not a likeness
    assert copy_threshold(training=twice) == pytest.approx(expected)
    assert copy_rate(generated=training, training=training) == 1
    assert copy_rate(generated=-generated - 5, training=training + 5) == 0
    with pytest.raises(ValueError, match="the same picture"):
        copy_threshold(training=training[:1].repeat(3, 1))


def test_copies_refuse_other_mirrors_and_no_cosine():
    training, generated = gaussian_sets(5, 4)
    with pytest.raises(ValueError, match="mirrored: expected"):
        nearest_images(generated=generated, training=training, mirrored=training[:4])
    with pytest.raises(ValueError, match="threshold=95"):
        copy_rate(generated=generated, training=training, threshold=95)


def test_vendi_is_the_exponential_of_the_entropy():
    features, _ = gaussian_sets(40)
    rows = normalize(features)
    shares = torch.linalg.eigvalsh(rows @ rows.T / 40)
    shares = shares[shares > 1e-12]
    expected = float(torch.exp(-(shares * shares.log()).sum()))
    assert vendi(features=features) == pytest.approx(expected, rel=1e-9)
    assert vendi(features=features[:8]) < 8 < expected
    found = vendi_with_interval(features=features)
    assert found.interval.low < found.value < found.interval.high


def test_vendi_counts_rows_without_direction_as_alike_and_unlike_all_others():
    features, _ = gaussian_sets(40)
    features[3] = features[17] = 0
    cosines = normalize(features) @ normalize(features).T
    cosines[3, 3] = cosines[17, 17] = cosines[3, 17] = cosines[17, 3] = 1
    shares = torch.linalg.eigvalsh(cosines / 40)
    shares = shares[shares > 1e-12]
    assert vendi(features=features) == pytest.approx(
        float(torch.exp(-(shares * shares.log()).sum())), rel=1e-9
    )
    assert vendi(features=torch.zeros(4, 3)) == pytest.approx(1)
