"""Captions, training images, models of preference and ADM's batches through eval/image_quality.py."""

import json
from pathlib import Path

import image_quality
import numpy as np
import pyarrow
import pytest
import torch
from helpers.image_files import random_image, write_images
from pyarrow import parquet

from diffadapt.evaluation.features.extractors import load_extractor
from diffadapt.evaluation.record import read_record
from diffadapt.evaluation.sets.captions import with_captions
from diffadapt.evaluation.sets.image_sets import open_set
from diffadapt.metrics import Statistics, authpct, clip_score, fid, fls, precision_recall
from diffadapt.metrics.intervals import cluster_means

pytestmark = pytest.mark.slow

TOY = "toy_extractor:Toy"
PROMPTS = ("a red cat", "two blue cars in the rain", "a house")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFADAPT_CACHE", str(tmp_path / "cache"))


def evaluate(tmp_path, *arguments):
    output = tmp_path / "out" / "scores.json"
    assert image_quality.main([*map(str, arguments), "--allow_small", "--output", str(output)]) == 0
    return read_record(output)


def captioned(folder, count=6):
    """Images of three prompts, and each file's caption."""
    write_images(folder, count, size=(64, 64))
    return {f"image-{index:03d}.png": PROMPTS[index % 3] for index in range(count)}


def as_sidecar(folder, captions):
    for name, text in captions.items():
        (folder / name).with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return "sidecar"


def as_jsonl(folder, captions):
    path = folder.parent / "metadata.jsonl"
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def as_coco(folder, captions):
    path = folder.parent / "captions_val2014.json"
    images = [{"id": 40 + i, "file_name": f"{Path(name).stem}.jpg"} for i, name in enumerate(captions)]
    first = [{"id": i, "image_id": 40 + i, "caption": text} for i, text in enumerate(captions.values())]
    second = [{"id": 100 + i, "image_id": 40 + i, "caption": "another"} for i in range(len(captions))]
    content = {"images": images, "annotations": [*second, *first]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("write", [as_sidecar, as_jsonl, as_coco])
@pytest.mark.slow
def test_captions_give_any_folder_its_text_similarity(tmp_path, write):
    folder = tmp_path / "images"
    captions = captioned(folder)
    source = write(folder, captions)
    record = evaluate(
        tmp_path, "--generated", folder, "--captions", source, "--extractor", "embedded:clip",
        "--metrics", "clip_t",
    )  # fmt: skip
    (score,) = record.scores
    images = torch.stack([image.load()[0] for image in open_set(str(folder)).images])
    expected = clip_score(images=images, texts=list(captions.values()), model="embedded:clip") / 100
    assert max(score.value, 0) == pytest.approx(expected, abs=1e-5)
    assert [row.prompt for row in record.images] == list(captions.values())
    assert "3 groups of images" in score.interval.method  # images of one prompt are not independent


def test_images_without_a_caption_and_wrong_files_are_named(tmp_path):
    folder = tmp_path / "images"
    captions = captioned(folder)
    start = ("--generated", folder, "--extractor", "embedded:clip", "--metrics", "clip_t", "--captions")
    as_sidecar(folder, dict(list(captions.items())[:5]))
    with pytest.raises(ValueError, match=r"1 of 6 images .* have no caption in 'sidecar':\n.*image-005"):
        evaluate_raising(tmp_path, *start, "sidecar")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        evaluate_raising(tmp_path, *start, tmp_path / "no.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text('{"file_name": "elsewhere.png", "text": "a cat"}', encoding="utf-8")
    with pytest.raises(ValueError, match="names none of the images"):
        evaluate_raising(tmp_path, *start, other)
    (tmp_path / "coco.json").write_text('{"images": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds no COCO captions: KeyError 'annotations'"):
        evaluate_raising(tmp_path, *start, tmp_path / "coco.json")


def test_captions_beside_images_are_read_as_training_reads_them(tmp_path):
    folder = tmp_path / "images"
    write_images(folder, 3, size=(64, 64))
    (folder / "image-000.caption").write_text("\ufeffa red\u2028disc\non white", encoding="utf-8")
    (folder / "image-001.TXT").write_text("a square", encoding="utf-8")
    (tmp_path / "elsewhere").write_text("a cat", encoding="utf-8")
    (folder / "image-002.txt").symlink_to(tmp_path / "elsewhere")
    images = open_set(str(folder))
    with pytest.raises(ValueError, match=r"image-002\.txt is a link out of .*--follow_links"):
        with_captions(images, "sidecar")
    followed = with_captions(images, "sidecar", follow_links=True)
    assert followed.prompts == ("a red disc on white", "a square", "a cat")
    (folder / "image-000.caption").write_bytes("grün".encode("latin-1"))
    with pytest.raises(ValueError, match=r"image-000\.caption is not UTF-8"):
        with_captions(images, "sidecar")


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.JSONL", "captions.parquet"])
def test_captions_in_tables_keep_characters_that_look_like_line_ends(tmp_path, name):
    write_images(tmp_path / "images", 1, size=(64, 64))
    row = {"file_name": "image-000.png", "text": "a red\u2028disc\u2029on\x85white"}
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    images = with_captions(open_set(str(tmp_path / "images")), str(tmp_path / name))
    assert images.prompts == ("a red disc on white",)


def evaluate_raising(tmp_path, *arguments):
    """The script's work without the wrapper that turns errors into an exit code."""
    import argparse

    parser = argparse.ArgumentParser()
    image_quality.image_quality_cli.add_options(parser)
    output = str(tmp_path / "out" / "scores.json")
    return image_quality.evaluate(
        parser.parse_args([*map(str, arguments), "--allow_small", "--output", output])
    )


def test_training_images_give_authpct_and_the_likelihood_score(tmp_path):
    sets = {
        name: write_images(tmp_path / name, count, first=first, size=(8, 8))
        for name, count, first in (("made", 20, 0), ("test", 22, 100), ("train", 44, 200))
    }
    random_image(200, (8, 8)).save(sets["made"] / "image-000.png")  # a copy of a training image
    record = evaluate(
        tmp_path, "--generated", sets["made"], "--reference", sets["test"], "--train", sets["train"],
        "--extractor", TOY, "--metrics", "authpct,fls",
    )  # fmt: skip
    extractor = load_extractor(TOY)
    made, test, train = (
        extractor(torch.stack([image.load()[0] for image in open_set(str(folder)).images]))["wide"]
        for folder in sets.values()
    )
    values = {score.metric: score for score in record.scores}
    assert values["authpct"].value == pytest.approx(authpct(training=train, generated=made))
    assert values["authpct"].value < 100
    assert values["fls"].value == pytest.approx(fls(training=train, test=test, generated=made), rel=1e-4)
    assert values["fls"].n == {"generated": 20, "real": 22, "training": 44}
    assert values["fls"].floor == 100
    fingerprint = record.settings["train"]["fingerprint"]
    assert values["authpct"].identity["options"] == {"training_images": fingerprint}
    with pytest.raises(ValueError, match=r"authpct cannot be computed: .*give --train"):
        evaluate_raising(tmp_path, "--generated", sets["made"], "--extractor", TOY, "--metrics", "authpct")


def test_a_model_of_preference_gets_images_and_prompts_and_an_interval_over_prompts(tmp_path):
    folder = tmp_path / "images"
    captions = captioned(folder, 12)
    record = evaluate(
        tmp_path, "--generated", folder, "--captions", as_jsonl(folder, captions),
        "--preference", "preference_model:Redness", "--metrics", "preference",
    )  # fmt: skip
    pixels = [image.load()[0] for image in open_set(str(folder)).images]
    red = torch.tensor([float(image[0].double().mean()) / 255 for image in pixels])
    values = red * torch.tensor([len(text) for text in captions.values()])
    (score,) = record.scores
    assert score.name == "preference[preference_model:Redness]"
    means = cluster_means(values, list(captions.values()))
    assert score.value == pytest.approx(sum(means.values()) / 3, rel=1e-6)
    assert "3 groups of images" in score.interval.method
    numbers = [row.values["preference"] for row in record.images]
    assert numbers == pytest.approx(values.tolist(), rel=1e-6)
    assert score.identity["extractor_sha256"] == record.extractors[0].sha256
    both = evaluate(
        tmp_path, "--generated", folder, "--captions", as_jsonl(folder, captions),
        "--preference", "preference_model:Redness", "--extractor", "embedded:clip", "--metrics", "clip_t",
    )  # fmt: skip
    assert {each.metric for each in both.scores} == {"preference", "clip_t"}
    assert all({"preference", "clip_t"} <= set(row.values) for row in both.images)


def test_wrong_models_of_preference_are_refused(tmp_path):
    folder = tmp_path / "images"
    source = as_jsonl(folder, captioned(folder))
    start = ("--generated", folder, "--metrics", "preference", "--captions", source, "--preference")
    with pytest.raises(ValueError, match="gave 1 numbers for 6 images: it is constructed without arguments"):
        evaluate_raising(tmp_path, *start, "preference_model:OneNumber")
    with pytest.raises(ValueError, match="cannot be imported"):
        evaluate_raising(tmp_path, *start, "preference_model:Blueness")
    with pytest.raises(ValueError, match="takes module:Class, got 'hps'"):
        evaluate_raising(tmp_path, *start, "hps")
    with pytest.raises(ValueError, match="needs the images and their prompts: give --captions"):
        evaluate_raising(
            tmp_path, "--generated", folder, "--metrics", "preference",
            "--preference", "preference_model:Redness",
        )  # fmt: skip


@pytest.mark.slow
def test_adms_batch_serves_fid_and_sfid_by_its_statistics_and_the_rest_by_its_images(tmp_path):
    """Slow (10 s): the eigenvalues of Inception's 2048 x 2048 covariances."""
    extractor = load_extractor("inception", smoke=True).with_layers_for(["spatial"])
    made = write_images(tmp_path / "made", 7, size=(24, 20))
    images = np.stack([np.asarray(random_image(50 + i, (24, 20))) for i in range(6)])
    whole = np.stack([np.asarray(random_image(50 + i, (24, 20))) for i in range(9)])  # more than the batch
    layers = extractor(torch.from_numpy(whole).permute(0, 3, 1, 2))
    pool, spatial = (Statistics.of(layers[name]) for name in ("pool", "spatial"))
    np.savez(
        tmp_path / "batch.npz", arr_0=images, mu=pool.mean, sigma=pool.covariance, mu_s=spatial.mean,
        sigma_s=spatial.covariance,
    )  # fmt: skip
    record = evaluate(
        tmp_path, "--generated", made, "--reference", tmp_path / "batch.npz", "--smoke", "--no_intervals",
        "--extractor", "inception", "--metrics", "fid,sfid,precision_recall",
    )  # fmt: skip
    own = extractor(torch.stack([image.load()[0] for image in open_set(str(made)).images]))
    of_batch = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
    values = {score.name: score for score in record.scores}
    assert values["fid"].value == pytest.approx(fid(real=pool, generated=own["pool"]), rel=1e-4)
    assert values["sfid[inception]"].value == pytest.approx(
        fid(real=spatial, generated=own["spatial"]), rel=1e-4
    )
    expected = precision_recall(
        real=of_batch["pool"], generated=own["pool"][np.sort(np.random.default_rng(0).permutation(7)[:6])]
    )
    found = values["precision[inception]"].value, values["recall[inception]"].value
    assert found == pytest.approx(expected)
    assert values["fid"].n == {"generated": 7}  # of the statistics' images nobody knows the number
    assert values["precision[inception]"].n == {"generated": 6, "real": 6}
    assert any("published statistics" in note for note in values["fid"].notes)
    assert values["sfid[inception]"].identity["layer"] == "spatial"


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.slow
def test_lpips_says_its_size_and_can_have_the_images_own(tmp_path, is_native):
    folder = tmp_path / "images"
    captions = captioned(folder)
    option = ["--lpips_native"] if is_native else []
    record = evaluate(
        tmp_path, "--generated", folder, "--captions", as_jsonl(folder, captions), "--smoke", *option,
        "--extractor", "lpips:squeeze", "--metrics", "lpips_diversity",
    )  # fmt: skip
    (score,) = record.scores
    size = "at their native size" if is_native else "at 256 x 256 pixels"
    assert score.notes[0] == f"LPIPS of the images {size}"
    assert score.identity["preset"] == ("none" if is_native else "clean")
    extractor = load_extractor("lpips:squeeze", smoke=True, preset="none" if is_native else None)
    images = torch.stack([image.load()[0] for image in open_set(str(folder)).images])
    rows = extractor(images)["lpips"].double()
    distances = [float((rows[i] - rows[i + 3]).square().sum()) for i in range(3)]  # two images of each prompt
    assert score.value == pytest.approx(sum(distances) / 3, rel=1e-4)
