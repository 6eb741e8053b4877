"""eval/image_quality.py as it is used: demonstration, folders, adapters, runs, wrong input."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from class_pipelines import class_pipeline
from image_files import write_images
from pipelines import tiny_sd_pipeline

import diffadapt as da
from diffadapt.evaluation import drawn_files
from diffadapt.evaluation.drawing import files_of_run, labelled
from diffadapt.evaluation.options import labels_of
from diffadapt.evaluation.record import read_record
from diffadapt.looks import AdapterFile
from diffadapt.models.any_pipeline import open_base

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

import image_quality

TOY = "toy_extractor:Toy"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFADAPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sets(tmp_path):
    return str(write_images(tmp_path / "a", 6)), str(write_images(tmp_path / "real", 7, first=50))


def evaluate(tmp_path, *arguments):
    output = tmp_path / "out" / "scores.json"
    code = image_quality.main([*map(str, arguments), "--output", str(output)])
    return code, output


def test_the_demonstration_writes_json_table_csv_and_page(tmp_path, capsys):
    code, output = evaluate(tmp_path, "--no_intervals", "--metrics", "fid,precision_recall,clip_i")
    record = read_record(output)
    assert code == 0
    assert record.stamp == "DEMO"
    assert [s.name for s in record.scores][:2] == [
        "frechet_distance[embedded:clip]",
        "precision[embedded:clip]",
    ]
    assert len(record.images) == record.sets["held_out"].count == 200
    assert all("below the minimum" in " ".join(s.notes) for s in record.scores if s.metric != "clip_i")
    shown = capsys.readouterr().out
    assert "real against real" in shown
    assert output.with_suffix(".md").read_text(encoding="utf-8") in shown
    assert "<img" in output.with_suffix(".html").read_text(encoding="utf-8")
    assert len(list(csv.DictReader(output.with_suffix(".csv").open(encoding="utf-8")))) == 200


def test_random_weights_are_stamped_in_every_output(tmp_path, sets, capsys):
    code, output = evaluate(
        tmp_path, "--generated", sets[0], "--reference", sets[1], "--extractor", "inception", "--smoke",
        "--metrics", "kid", "--allow_small", "--no_cache",
    )  # fmt: skip
    assert code == 0
    assert read_record(output).stamp == "NOT A SCORE"
    assert "NOT A SCORE" in capsys.readouterr().out
    for suffix in (".md", ".csv", ".html"):
        assert "NOT A SCORE" in output.with_suffix(suffix).read_text(encoding="utf-8"), suffix


def test_several_folders_bad_files_options_and_cache(tmp_path, sets):
    (Path(sets[0]) / "bad.png").write_text("no image", encoding="utf-8")
    other = write_images(tmp_path / "more" / "a", 6, first=20)
    arguments = [
        "--generated", sets[0], other, "--reference", sets[1], "--extractor", TOY, "--allow_small",
        "--skip_bad", "--metrics", "precision_recall", "--metric_options", "precision_recall.k=2",
    ]  # fmt: skip
    code, output = evaluate(tmp_path, *arguments)
    record = read_record(output)
    assert code == 0
    assert record.labels == ["a", "more-a"]
    assert record.sets["a"].count == 6
    assert "bad.png" in record.sets["a"].skipped[0]
    assert {score.identity["options"]["k"] for score in record.scores} == {2}
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the reference alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--metrics", "fidd"], "did you mean fid"),
        (["--metric_options", "precision_recall.j=3"], "has no option 'j'"),
        (["--metric_options", "k=3"], "METRIC.OPTION=VALUE"),
        (["--extractor", "inception"], "weights-inception"),
        (["--reference", "{a}"], "the same folder twice"),
        (["--metrics", "fid"], "--allow_small"),
        (["--feature_batch_size", "0"], "at least 1"),
        (["--adapters", "/nowhere.safetensors"], "nowhere"),
        (["--prompt", "a cat", "--keep_images", "kept"], "--prompt, --keep_images: nothing is drawn"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, sets, change, message, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    basis = ["--generated", sets[0], "--reference", sets[1], "--extractor", TOY]
    code, output = evaluate(tmp_path, *basis, *(part.format(a=sets[0]) for part in change))
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not output.parent.exists()


def test_a_reference_without_anything_to_score(tmp_path, sets, capsys):
    assert evaluate(tmp_path, "--reference", sets[1])[0] == 2
    assert "nothing to score" in capsys.readouterr().err


def test_verify_runs_the_analytic_cases(capsys, monkeypatch):
    assert image_quality.main(["--verify"]) == 0
    assert "cases hold on this machine" in capsys.readouterr().out
    from diffadapt.metrics.analytic import AnalyticCase

    monkeypatch.setattr(image_quality, "analytic_cases", lambda: [AnalyticCase("x", 1.0, 2.0, 0.1)])
    assert image_quality.main(["--verify"]) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base and the folder of a run with two checkpoints and a final adapter, all different."""
    root = tmp_path_factory.mktemp("trained")
    base = tiny_sd_pipeline(root / "base")
    pipe = open_base(str(base))
    for index, name in enumerate(("checkpoint-2", "checkpoint-10", ".")):
        adapter = da.attach(pipe, da.make_method("lora", rank=2), targets="attention", seed=index)
        torch.manual_seed(index)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        (root / "run" / name).mkdir(parents=True, exist_ok=True)
        da.save(adapter, root / "run" / name / "adapter.safetensors", base=str(base))
        da.detach(adapter)
    figures = {"method": "lora", "parameters": 123, "seconds": 4.5, "peak_memory_bytes": 678}
    (root / "run" / "run.json").write_text(json.dumps(figures), encoding="utf-8")
    return root / "run"


DRAWING = ["--num_images", "2", "--num_inference_steps", "2", "--guidance_scale", "1", "--seed", "5"]


def test_every_checkpoint_of_a_run_with_paired_seeds(tmp_path, trained):
    run = trained
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    reference = write_images(tmp_path / "real", 5, size=(32, 32))
    arguments = [
        "--run", run, "--with_base", "--prompts", prompts, *DRAWING, "--reference", reference,
        "--allow_small", "--extractor", "embedded:clip", "--metrics", "clip_t,clip_i", "--no_intervals",
    ]  # fmt: skip
    code, output = evaluate(tmp_path, *arguments, "--keep_images", tmp_path / "kept")
    record = read_record(output)
    assert code == 0
    assert record.labels == ["base", "checkpoint-2", "checkpoint-10", "run"]
    assert {row.seed for row in record.images} == {5, 6}
    assert [row.prompt for row in record.images[:4]] == ["a cat", "a cat", "a dog", "a dog"]
    names = {label: sorted(p.name for p in (tmp_path / "kept" / label).iterdir()) for label in record.labels}
    assert names["base"] == names["run"]
    assert len({record.sets[label].fingerprint for label in record.labels}) == 4
    assert record.sets["run"].made["run"]["seconds"] == 4.5
    assert "seconds" not in record.sets["checkpoint-2"].made["run"]
    assert record.sets["run"].made["sampler"]["num_inference_steps"] == 2
    assert record.stamp == ""
    values = {(score.generated, score.metric) for score in record.scores}
    assert values == {(label, metric) for label in record.labels for metric in ("clip_t", "clip_i")}


def test_images_that_are_not_kept_are_removed_and_the_same(tmp_path, trained, monkeypatch):
    run = trained
    folders = []
    monkeypatch.setattr(
        image_quality, "draw_sets", lambda a, f, folder: folders.append(folder) or DRAW(a, f, folder)
    )
    arguments = [
        "--adapters", run / "adapter.safetensors:0.5", "--prompt", "a cat", *DRAWING, "--extractor", TOY,
        "--metrics", "vendi", "--allow_small", "--no_intervals",
    ]  # fmt: skip
    fingerprints = []
    for batch in ("1", "2"):
        code, output = evaluate(tmp_path, *arguments, "--batch_size", batch)
        assert code == 0
        fingerprints.append(read_record(output).sets["adapter"].fingerprint)
        assert read_record(output).sets["adapter"].made["strength"] == 0.5
    assert not any(Path(folder).exists() for folder in folders)
    assert len(folders) == 2


DRAW = image_quality.draw_sets


def test_a_base_that_is_told_classes(tmp_path):
    base = class_pipeline(tmp_path / "base")
    arguments = ["--with_base", "--base", base, "--class_labels", "0,2", *DRAWING, "--extractor", TOY]
    code, output = evaluate(tmp_path, *arguments, "--metrics", "vendi", "--allow_small", "--no_intervals")
    record = read_record(output)
    assert code == 0
    assert [row.prompt for row in record.images] == ["class 0", "class 0", "class 2", "class 2"]
    assert record.sets["base"].made["labels"] == [0, 0, 2, 2]
    assert record.settings["demo"] is False


def test_images_that_are_not_kept_need_one_machine(monkeypatch):
    class FourProcesses:
        num_processes, is_main_process = 4, True

    monkeypatch.setattr(drawn_files, "PartialState", FourProcesses)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"several machines .* --keep_images"), drawn_files.passing_folder():
        pass


def test_the_base_alone_must_be_named(tmp_path, capsys):
    assert evaluate(tmp_path, "--with_base", "--prompt", "a cat", "--extractor", TOY)[0] == 2
    assert "needs --base" in capsys.readouterr().err


def test_files_of_a_run_stand_in_the_order_of_steps(trained, tmp_path):
    names = [Path(file).parent.name for file in files_of_run(str(trained))]
    assert names == ["checkpoint-2", "checkpoint-10", "run"]
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        files_of_run(str(tmp_path))


def test_labels_are_short_and_unique():
    assert list(labels_of(["x/a", "y/a", "b.zip", "reference", "y/a"])) == [
        "a",
        "y-a",
        "b",
        "reference-2",
        "y-a-2",
    ]
    files = [
        AdapterFile(path, 1.0) for path in ("r/cat.safetensors", "r/dog.safetensors", "r/base.safetensors")
    ]
    assert list(labelled(files)) == ["cat", "dog", "base-2"]
    same = [AdapterFile(f"{folder}/adapter.safetensors", 1.0) for folder in ("one", "two")]
    assert list(labelled(same)) == ["one", "two"]
