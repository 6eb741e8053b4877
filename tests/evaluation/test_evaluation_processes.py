"""Two real processes draw and score as one does: whole batches each, merged in fixed order."""

import json

import pytest
import torch
from helpers import run_evaluation
from helpers.image_files import random_image, write_images
from helpers.torchrun import run_torchrun

import diffadapt as da
from diffadapt.evaluation.record import read_record
from diffadapt.models.open_pipeline import open_frozen_pipeline

DRAWING = ["--num_inference_steps", "2", "--num_threads", "1"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A file that changes what the embedded base draws."""
    path = tmp_path_factory.mktemp("trained") / "cat.safetensors"
    made = da.attach(
        open_frozen_pipeline("embedded:emoji"), da.make_method("lora", rank=2), targets="attention"
    )
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    da.save(made, path, base="embedded:emoji")
    return str(path)


def folders(generated, real, out):
    """Folders, one image of another size and one that is none; the reference's features go to the cache."""
    return [
        "image_quality", "--generated", str(generated), "--reference", str(real), "--skip_bad",
        "--extractor", "toy_extractor:Toy", "--metrics", "fid,kid,precision_recall,vendi",
        "--feature_batch_size", "4", "--cache_dir", str(out / "cache"), "--allow_small", "--no_intervals",
        "--num_threads", "1", "--output", str(out / "folders.json"),
    ]  # fmt: skip


def drawn(adapter, real, out):
    """An adapter and its base, images not kept; of the reference one extractor's features are cached."""
    return [
        "image_quality", "--adapters", adapter, "--with_base", "--prompt", "a cat face emoji",
        "--prompt", "a monkey face emoji", "--num_images", "3", "--batch_size", "2", *DRAWING,
        "--reference", str(real), "--extractor", "toy_extractor:Toy,embedded:clip",
        "--metrics", "vendi,clip_t,precision_recall", "--metric_options", "precision_recall.k=2",
        "--feature_batch_size", "4", "--cache_dir", str(out / "cache"), "--allow_small", "--no_intervals",
        "--output", str(out / "drawn.json"),
    ]  # fmt: skip


def subjects(adapter, out):
    """The base and an adapter on one embedded subject."""
    given = ["--adapters", f"cat={adapter}", "--compare", "--samples", "1", "--batch_size", "4", *DRAWING]
    return ["subject", *given, "--output", str(out)]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, adapter, monkeypatch):
    generated, real = write_images(tmp_path / "a", 19), write_images(tmp_path / "real", 23, first=50)
    random_image(3, (30, 20)).save(generated / "image-007.png")
    (generated / "image-011.png").write_text("no image", encoding="utf-8")
    outs, names = (tmp_path / "one", tmp_path / "two"), ("folders", "drawn", "subject")
    commands = [
        [folders(generated, real, out), drawn(adapter, real, out), subjects(adapter, out)] for out in outs
    ]
    run_evaluation.run_all(commands[0])
    run_torchrun(run_evaluation.__file__, json.dumps(commands[1]))
    for name in names:
        one, two = (read_record(out / f"{name}.json") for out in outs)
        assert (one.settings["processes"], two.settings["processes"]) == (1, 2)
        assert two.sets == one.sets, name
        assert len(one.scores) == len(two.scores) > 2
        for first, second in zip(one.scores, two.scores, strict=True):
            assert (first.name, first.identity) == (second.name, second.identity)
            assert second.value == pytest.approx(first.value, rel=1e-6, abs=1e-9)
        assert [(row.generated, row.name, row.seed) for row in two.images] == [
            (row.generated, row.name, row.seed) for row in one.images
        ]
        for first, second in zip(one.images, two.images, strict=True):
            assert second.values == pytest.approx(first.values, rel=1e-5, abs=1e-6)
    assert len(read_record(outs[1] / "folders.json").images) == 18
    assert len(list((outs[1] / "cache").iterdir())) == 2  # of the reference, one of each extractor
