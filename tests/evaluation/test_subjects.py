"""DreamBooth's protocol: its prompts file, its subjects, and its scores against restatements."""

import numpy as np
import pytest
import torch
from helpers.prompts_file import FILE
from PIL import Image

from diffadapt.evaluation.features.extractors.base import Extractor
from diffadapt.evaluation.report.page import page
from diffadapt.evaluation.sets.image_files import ArrayImage
from diffadapt.evaluation.subject.evaluate_subjects import check_extractors, evaluate_subjects
from diffadapt.evaluation.subject.generate import SubjectSampling
from diffadapt.evaluation.subject.subjects import (
    SubjectImages,
    embedded_subjects,
    existing_images,
    open_subjects,
    read_prompts,
)


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text(FILE, encoding="utf-8")
    return read_prompts(tmp_path / "prompts.txt")


def save(folder, count, seed=0, size=8):
    """Random images; returns their values."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    for index, value in enumerate(values):
        Image.fromarray(value).save(folder / f"{index:02d}.png")
    return values


def test_the_prompts_file_is_read_as_it_is(prompts):
    assert prompts.classes == {"backpack": "backpack", "bear_plushie": "stuffed animal", "cat": "cat"}
    assert len(prompts.object_templates) == 3
    assert prompts.object_templates[2] == "a child's {0} {1}"
    assert prompts.of("stuffed animal") == prompts.object_templates
    assert prompts.of("cat") == prompts.live_templates


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'a red {0} {1}'.format(unique_token, class_token)", "__import__('os').system('true')"),
        ("in the jungle", "in the {2}"),
        ("in the jungle", "in {0.__class__}"),
        ("backpack,backpack", "backpack"),
        ("Classes", "Klassen"),
    ],
)
def test_a_line_of_another_form_is_refused_with_its_number_and_nothing_is_run(tmp_path, old, new):
    (tmp_path / "prompts.txt").write_text(FILE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompts.txt, line \d+: .* is not of the dreambooth format"):
        read_prompts(tmp_path / "prompts.txt")


def test_a_file_that_is_too_long_or_lacks_a_part_is_refused(tmp_path):
    (tmp_path / "long.txt").write_text(FILE + "\n" * (1 << 20), encoding="utf-8")
    with pytest.raises(ValueError, match="at most 1,048,576"):
        read_prompts(tmp_path / "long.txt")
    (tmp_path / "short.txt").write_text(FILE[: FILE.index("Object")], encoding="utf-8")
    with pytest.raises(ValueError, match="lacks objects"):
        read_prompts(tmp_path / "short.txt")


def test_subjects_have_their_prompts_and_texts_without_the_unique_token(tmp_path, prompts):
    save(tmp_path / "data" / "cat", 2)
    save(tmp_path / "data" / "bear_plushie", 3)
    plush, cat = open_subjects(tmp_path / "data", prompts)
    assert plush.prompts("sks")[0] == "a sks stuffed animal in the jungle"
    assert plush.texts()[0] == "a stuffed animal in the jungle"
    assert cat.texts() == ["a cat wearing a red hat", "a red cat"]
    assert [image.name for image in cat.real] == ["cat/00.png", "cat/01.png"]
    assert [own.name for own in open_subjects(tmp_path / "data", prompts, ["cat"])] == ["cat"]
    save(tmp_path / "data" / "cats", 1)
    with pytest.raises(ValueError, match=r"'cats' has no class in the prompts file.*cat"):
        open_subjects(tmp_path / "data", prompts)
    with pytest.raises(FileNotFoundError, match="no folder of subjects"):
        open_subjects(tmp_path / "nowhere", prompts)


def test_the_embedded_subjects_are_the_shipped_cat_and_monkey():
    subjects = embedded_subjects()
    assert [(own.name, len(own.real)) for own in subjects] == [("cat", 9), ("monkey", 3)]
    assert subjects[0].texts()[0] == "a cat face emoji on a red background"
    with pytest.raises(ValueError, match="no embedded subject 'dog'"):
        embedded_subjects(["dog"])


def test_existing_images_belong_to_the_prompt_whose_number_begins_their_name(tmp_path, prompts):
    save(tmp_path / "data" / "cat", 2)
    cat = open_subjects(tmp_path / "data", prompts)
    save(tmp_path / "made" / "cat" / "01", 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "made" / "cat" / "00-red hat.png")
    (own,) = existing_images(tmp_path / "made", cat)
    assert sorted(own.numbers) == [0, 1, 1]
    assert own.numbers[[p.name for p in own.images].index("cat/00-red hat.png")] == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "made" / "cat" / "02-x.png")
    with pytest.raises(
        ValueError, match=r"cat/02-x.png does not begin with the number of its prompt, 00 to 01"
    ):
        existing_images(tmp_path / "made", cat)


def test_samples_have_the_same_seeds_for_every_prompt_and_others_for_every_subject(tmp_path):
    cat, monkey = embedded_subjects()
    sampling = SubjectSampling("embedded:emoji", tmp_path, samples=2, seed=5)
    assert [request.seed for request in sampling.requests(cat, 0)][:4] == [5, 6, 5, 6]
    assert {request.seed for request in sampling.requests(monkey, 1)} == {7, 8}
    assert sampling.requests(cat, 0)[2].prompt == "a sks cat face emoji on a blue background"
    with pytest.raises(ValueError, match="--samples must be at least 1, got 0"):
        SubjectSampling("embedded:emoji", tmp_path, samples=0)
    assert sampling.config().autocast is None  # on a CPU
    half = SubjectSampling("embedded:emoji", tmp_path, mixed_precision="bf16")
    assert half.config().autocast == torch.bfloat16


def toy(name="clip:toy", **options):
    """Features are the pixels themselves; texts are numbers made of their letters."""

    def texts(captions):
        rows = [np.random.default_rng(list(caption.encode())).normal(size=192) for caption in captions]
        return torch.tensor(np.array(rows), dtype=torch.float32)

    known = {"layers": ("image",), "feature_layer": "image", "embed_texts": texts} | options
    layer = known["layers"][0]
    return Extractor(name, "ab" * 32, 8, "clean", network=lambda x: {layer: x.flatten(1) - 128.0}, **known)


def unit(rows):
    rows = rows.reshape(len(rows), -1).astype(np.float64) - 128
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def channels_first(values):
    return values.transpose(0, 3, 1, 2)


@pytest.fixture
def evaluated(tmp_path, prompts):
    """Two subjects; of the cat one generated image is a mirrored copy of a real one."""
    real = {
        "bear_plushie": save(tmp_path / "data" / "bear_plushie", 3, 1),
        "cat": save(tmp_path / "data" / "cat", 4, 2),
    }
    subjects = open_subjects(tmp_path / "data", prompts)
    drawn, images = {}, []
    for place, subject in enumerate(subjects):
        numbers = [0, 0, 0, 1, 1]  # not the same number of samples for every prompt
        values = np.random.default_rng(10 + place).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
        if subject.name == "cat":
            values[4] = real["cat"][2][:, ::-1]
        drawn[subject.name] = values
        generated = tuple(ArrayImage(f"{subject.name}/{i}", v) for i, v in enumerate(values))
        images.append(SubjectImages(subject, generated, tuple(numbers), tuple(range(5))))
    extractors = [
        toy(),
        toy("lpips:toy", layers=("lpips",), feature_layer=None, perceptual_layer="lpips", embed_texts=None),
    ]
    record = evaluate_subjects(
        {"ours": (images, {})}, extractors, token="sks", seed=0, settings={"demo": True}
    ).record
    return record, subjects, real, drawn


def nested_mean(values, numbers=(0, 0, 0, 1, 1)):
    """Per prompt, then over the prompts of a subject."""
    return np.mean(
        [np.mean([v for v, n in zip(values, numbers, strict=True) if n == k]) for k in set(numbers)]
    )


def test_every_score_is_averaged_per_prompt_then_per_subject_then_over_subjects(evaluated):
    record, subjects, real, drawn = evaluated
    scores = {score.metric: score for score in record.scores}
    likeness, ceiling, agreement, diversity = [], [], [], []
    for subject in subjects:
        made, own = (unit(channels_first(values[subject.name])) for values in (drawn, real))
        likeness.append(nested_mean((made @ own.T).mean(1)))
        pairs = own @ own.T
        ceiling.append(pairs[~np.eye(len(own), dtype=bool)].mean())
        words = toy().embed_texts(subject.texts()).double().numpy()
        words /= np.linalg.norm(words, axis=1, keepdims=True)
        agreement.append(nested_mean((made * words[[0, 0, 0, 1, 1]]).sum(1)))
        rows = channels_first(drawn[subject.name]).reshape(5, -1).astype(float)
        squares = ((rows[:, None] - rows[None]) ** 2).sum(2)
        diversity.append(np.mean([squares[[0, 0, 1], [1, 2, 2]].mean(), squares[3, 4]]))
    assert scores["clip_i"].name == "clip_i[clip:toy]"
    assert scores["clip_i"].value == pytest.approx(np.mean(likeness), rel=1e-5)
    assert scores["clip_i"].floor == pytest.approx(np.mean(ceiling), rel=1e-5)
    assert scores["clip_t"].value == pytest.approx(np.mean(agreement), rel=1e-5)
    assert scores["lpips_diversity"].value == pytest.approx(np.mean(diversity), rel=1e-5)
    for score in record.scores:
        assert score.interval.low <= score.value <= score.interval.high
        assert ("Clopper" if score.metric == "copy_rate" else "over 2 subjects") in score.interval.method
        assert "few subjects (2)" in score.notes[0]
    assert scores["lpips_diversity"].notes[1] == "LPIPS of the images at 8 x 8 pixels"


def test_a_mirrored_copy_of_a_real_image_is_found_and_named(evaluated):
    record, *_ = evaluated
    row = next(row for row in record.images if row.name == "cat/4")
    assert row.values["nearest_similarity"] == pytest.approx(1, abs=1e-6)
    assert row.nearest == "cat/02.png"
    assert row.prompt == "a red sks cat"
    copies = next(score for score in record.scores if score.metric == "copy_rate")
    beyond = sum(row.values["nearest_similarity"] > 0.99 for row in record.images)
    assert beyond == 1
    assert copies.value >= beyond / 10


def test_the_page_of_a_subject_record_shows_generated_and_real_images_side_by_side(evaluated):
    record, *_ = evaluated
    html = page(record, lambda label, name: Image.new("RGB", (8, 8)))
    assert 'alt="reference: cat/02.png"' in html
    assert "a red sks cat" in html
    assert "DEMO" in html


def test_extractors_that_measure_no_likeness_or_the_same_kind_twice_are_refused():
    check_extractors([toy("clip:a"), toy("dino:b", embed_texts=None)])
    for given in ([toy("clip:a"), toy("embedded:clip")], [toy("inception", embed_texts=None)], []):
        with pytest.raises(ValueError, match="needs one clip or dino extractor"):
            check_extractors(given)
