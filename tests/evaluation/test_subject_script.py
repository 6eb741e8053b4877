"""eval/subject.py as it is used: images made elsewhere, and what is refused before anything is drawn."""

import csv
import shutil

import pytest
import subject
from helpers.image_files import write_images
from helpers.prompts_file import FILE
from helpers.tiny_bases import tiny_base
from PIL import Image

import diffadapt as da
from diffadapt.common.exit_codes import run_command
from diffadapt.evaluation.record import read_record
from diffadapt.models.families import load_base

pytestmark = pytest.mark.slow


@pytest.fixture
def subjects(tmp_path):
    """Options that name two own subjects, a cat and a backpack, and the embedded extractor."""
    for place, name in enumerate(("backpack", "cat")):
        write_images(tmp_path / "data" / name, 3, first=50 * place, size=(20, 16))
    (tmp_path / "prompts.txt").write_text(FILE, encoding="utf-8")
    given = ["--subjects", tmp_path / "data", "--prompts", tmp_path / "prompts.txt"]
    return [*given, "--extractors", "embedded:clip"]


def evaluate(tmp_path, *arguments):
    output = tmp_path / "out"
    return run_command(lambda: subject.main([*map(str, arguments), "--output", str(output)])), output


def test_images_made_elsewhere(tmp_path, subjects, capsys):
    for place, (name, prompts) in enumerate((("backpack", 3), ("cat", 2))):
        for number in range(prompts):
            folder = tmp_path / "made" / name / f"{number:02d}"
            write_images(folder, 2, first=200 + 20 * place + 4 * number, size=(20, 16))
    code, output = evaluate(tmp_path, *subjects, "--images", tmp_path / "made")
    record = read_record(output / "subject.json")
    assert code == 0
    assert record.labels == ["made"]
    assert record.sets["made"].count == len(record.images) == 10
    assert {score.metric for score in record.scores} == {"clip_i", "clip_t", "copy_rate"}
    assert record.stamp == ""
    assert "real against real" in capsys.readouterr().out
    assert len(list(csv.DictReader((output / "subject.csv").open(encoding="utf-8")))) == 10
    assert (output / "subject.html").read_text(encoding="utf-8").count("<img") > 10


@pytest.mark.parametrize("family", ["sd3", "z_image"])
@pytest.mark.slow
def test_adapters_of_a_transformer_family(tmp_path, tmp_path_factory, subjects, family):
    base = tiny_base(family, tmp_path_factory)
    adapter = da.attach(load_base(str(base)).pipe, da.make_method("lora(rank=2)"), targets="attention")
    file = tmp_path / "cat.safetensors"
    da.save(adapter, file, base=str(base), metadata={"resolution": "32"})
    options = ["--adapters", f"cat={file}", "--samples", 1, "--num_inference_steps", 2, "--compare"]
    code, output = evaluate(tmp_path, *subjects, *options)
    assert code == 0
    record = read_record(output / "subject.json")
    assert record.sets["adapters"].count == record.sets["base"].count == 2
    for path in (output / "images").rglob("*.png"):
        assert Image.open(path).size == (32, 32)  # of the training images, not the base's own


def test_native_lpips_is_the_resize_of_lpips_alone(monkeypatch):
    monkeypatch.setattr(subject, "load_extractor", lambda name, **given: (name, given["preset"]))
    names = ["--extractors", "embedded:clip", "lpips:alex"]
    given = subject._parser().parse_args([*names, "--lpips_native"])
    assert subject.chosen_extractors(given, "cpu") == [("embedded:clip", None), ("lpips:alex", "none")]
    given = subject._parser().parse_args(names)
    assert subject.chosen_extractors(given, "cpu") == [("embedded:clip", None), ("lpips:alex", None)]


@pytest.mark.parametrize(
    ("own", "change", "message"),
    [
        (False, ["--adapters", "cat"], "SUBJECT=FILE"),
        (False, ["--adapters", "cat=/nowhere.safetensors"], "/nowhere.safetensors"),
        (False, ["--adapters", "dog=/nowhere.safetensors"], "no embedded subject 'dog'"),
        (False, ["--samples", "0"], "at least 1"),
        (False, ["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (False, ["--seed", str(2**63)], "--seed must be at least -2**63 and below 2**63"),
        (False, ["--seed", "-1"], "--seed must be at least 0, got -1"),
        (False, ["--prompts", "prompts.txt"], "belongs to --subjects"),
        (False, ["--base", "somewhere/else"], "both be embedded"),
        (False, ["--extractors", "embedded:digits"], "needs one clip or dino"),
        (True, [], "name what generates"),
        (True, ["--images", "/nowhere"], "/nowhere"),
        (True, ["--images", "/nowhere", "--compare"], "scores what is there"),
        (True, ["--extractors", "dino"], "facebook/dino-vits16"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(tmp_path, subjects, own, change, message, capsys):
    code, output = evaluate(tmp_path, *(subjects if own else []), *change)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not output.exists()


def test_own_subjects_need_their_prompts(tmp_path, capsys):
    assert evaluate(tmp_path, "--subjects", tmp_path)[0] == 2
    assert "--subjects needs --prompts FILE" in capsys.readouterr().err


@pytest.fixture
def made(tmp_path):
    """Generated images of both subjects, two of each prompt."""
    for place, (name, prompts) in enumerate((("backpack", 3), ("cat", 2))):
        for number in range(prompts):
            folder = tmp_path / "made" / name / f"{number:02d}"
            write_images(folder, 2, first=200 + 20 * place + 4 * number, size=(20, 16))
    return tmp_path / "made"


def test_one_real_image_of_a_subject_is_enough_for_likeness(tmp_path, subjects, made, capsys):
    for name in ("image-001.png", "image-002.png"):
        (tmp_path / "data" / "cat" / name).unlink()
    code, output = evaluate(tmp_path, *subjects, "--images", made)
    record = read_record(output / "subject.json")
    assert code == 0
    assert {score.metric for score in record.scores} == {"clip_i", "clip_t"}
    assert "subject 'cat'" in record.refused["made: copy_rate"]
    assert "at least 2" in record.refused["made: copy_rate"]
    assert "subject 'cat'" in capsys.readouterr().out


def test_damaged_files_are_named_and_skipped_when_told(tmp_path, subjects, made, capsys):
    (tmp_path / "data" / "cat" / "bad-real.png").write_text("no", encoding="utf-8")
    (made / "cat" / "00" / "bad-made.png").write_text("no", encoding="utf-8")
    assert evaluate(tmp_path, *subjects, "--images", made)[0] == 2
    error = capsys.readouterr().err
    assert "cat/bad-real.png" in error
    assert "--skip_bad" in error
    code, output = evaluate(tmp_path, *subjects, "--images", made, "--skip_bad")
    record = read_record(output / "subject.json")
    assert code == 0
    assert len(record.images) == record.sets["made"].count == 10
    assert "cat/bad-real.png" in record.sets["reference"].skipped[0]
    assert "cat/00/bad-made.png" in record.sets["made"].skipped[0]


def test_a_subject_without_a_readable_image_is_named(tmp_path, subjects, made, capsys):
    for path in (tmp_path / "data" / "cat").iterdir():
        path.write_text("no", encoding="utf-8")
    assert evaluate(tmp_path, *subjects, "--images", made, "--skip_bad")[0] == 2
    assert "subject 'cat' has no readable real image" in capsys.readouterr().err


def test_copies_of_the_real_images_can_be_scored(tmp_path, subjects, capsys):
    for name in ("backpack", "cat"):
        for number in range(2):
            shutil.copytree(tmp_path / "data" / name, tmp_path / "made" / name / f"{number:02d}")
    code, output = evaluate(tmp_path, *subjects, "--images", tmp_path / "made")
    assert code == 0
    record = read_record(output / "subject.json")
    assert {round(row.values["nearest_similarity"], 6) for row in record.images} == {1.0}


@pytest.mark.parametrize("place", ["/proc/out", "{here}/file", "{here}/file/out"])
def test_an_output_that_cannot_be_written_is_told_first(tmp_path, place, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    arguments = ["--subjects", "nowhere", "--output", place.format(here=tmp_path)]
    assert run_command(lambda: subject.main(arguments)) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error or "is a file" in error
