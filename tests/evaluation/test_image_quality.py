"""eval/image_quality.py as it is used: demonstration, folders, adapters, runs, wrong input."""

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path

import image_quality
import numpy as np
import pytest
import torch
from helpers.class_pipelines import class_pipeline
from helpers.image_files import write_images
from helpers.pipelines import tiny_sd_pipeline
from helpers.tiny_bases import tiny_base
from PIL import Image
from toy_extractor import Toy

import diffadapt as da
from diffadapt.evaluation import generated_files
from diffadapt.evaluation.generate import files_of_run, label_adapters
from diffadapt.evaluation.image_quality_cli import label_sets
from diffadapt.evaluation.record import read_record
from diffadapt.metrics.registry import METRICS
from diffadapt.models.open_pipeline import open_frozen_pipeline
from diffadapt.models.sampling_columns import AdapterFile

pytestmark = pytest.mark.slow

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


@pytest.mark.slow
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
    printed = shown[shown.index("**DEMO**") : shown.rindex(str(output))].strip()
    assert max(map(len, printed.splitlines())) <= 120
    assert "extractor: embedded:clip" in printed
    report = output.with_suffix(".md").read_text(encoding="utf-8")
    assert report.endswith("\n")
    assert printed[printed.index("- `") :] in report  # the same notes
    assert "## How it was made" in output.with_suffix(".md").read_text(encoding="utf-8")
    assert "<img" in output.with_suffix(".html").read_text(encoding="utf-8")
    assert len(list(csv.DictReader(output.with_suffix(".csv").open(encoding="utf-8")))) == 200


@pytest.mark.slow
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
        (["--metrics", "FID"], "did you mean fid"),
        (["--feature_batch_size", "0"], "at least 1"),
        (["--metrics_seed", str(2**64)], "--metrics_seed must be at least -2**63 and below 2**63"),
        (["--metrics_seed", "-1"], "--metrics_seed must be at least 0, got -1"),
        (["--num_threads", "0"], "--num_threads must be at least 1, got 0"),
        (["--num_images", "0"], "--num_images must be at least 1, got 0"),
        (["--guidance_scale", "nan"], "--guidance_scale must be at least 0, got nan"),
        (["--weights", "inceptionv3=x"], "there is nothing at"),
        (["--adapters", "/nowhere.safetensors"], "nowhere"),
        (["--prompt", "a cat", "--keep_images", "kept"], "--prompt, --keep_images: no images are generated"),
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


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{out}", "is a folder"),
        ("{out}/new/", "is a folder"),
        ("{out}/file/scores.json", "is a file, not a folder"),
        ("{out}/page.json", "page.html' is a folder"),
        ("/proc/scores.json", "cannot be written"),
        ("", "is a folder"),
        ("{out}/scores.html", "--output names the JSON file"),
        ("{out}/photo.png", "--output names the JSON file, the others stand beside it"),
        ("{out}/scores", "--output names the JSON file"),
        ("{out}/captions.json", "captions.json, which is not of an earlier evaluation"),
        ("{out}/table.json", "table.csv, which is not of an earlier evaluation"),
        ("{out}/" + 300 * "x" + "/scores.json", "too long"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_any_image_is_read(tmp_path, place, message, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "page.html").mkdir()
    for name in ("photo.png", "captions.json", "table.csv"):
        (tmp_path / name).write_text("precious", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    Toy.images_seen = 0
    arguments = ["--generated", "nowhere", "--extractor", TOY, "--output", place.format(out=tmp_path)]
    assert image_quality.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert Toy.images_seen == 0
    assert sorted(tmp_path.iterdir()) == before
    for name in ("photo.png", "captions.json", "table.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8") == "precious"


def test_an_evaluation_may_be_made_again_under_its_name(tmp_path, sets):
    arguments = ["--generated", sets[0], "--reference", sets[1], "--extractor", TOY, "--metrics", "clip_i"]
    assert [evaluate(tmp_path, *arguments, "--allow_small")[0] for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("option", ["--save_features", "--keep_images"])
def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path, sets, option, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    extra = ["--adapters", "nowhere.safetensors"] if option == "--keep_images" else []
    code, _ = evaluate(tmp_path, "--generated", sets[0], *extra, option, tmp_path / "file")
    assert code == 2
    assert "is a file; give a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["kid_subsets", "kid_subsets.size=12"], "kid_subsets with subsets=100, size=12, seed=2020 needs"),
        (["precision_recall", "precision_recall.k=6"], "needs at least 7 generated images, got 6"),
        (["msid", "msid.k=5"], "needs at least 7 generated images, got 6"),
        (["inception_score", "inception_score.splits=4"], "needs at least 8 generated images, got 6"),
        (["fid_infinity"], "needs at least 20 generated images, got 6"),
    ],
)
def test_named_metrics_are_checked_against_the_numbers_of_files(tmp_path, sets, options, message, capsys):
    Toy.images_seen = 0
    metric, *given = options
    arguments = ["--generated", sets[0], "--reference", sets[1], "--extractor", TOY, "--allow_small"]
    arguments += ["--metrics", f"fid,{metric}", *(["--metric_options", *given] if given else [])]
    code, output = evaluate(tmp_path, *arguments)
    assert code == 2
    assert message in capsys.readouterr().err
    assert Toy.images_seen == 0
    assert not output.parent.exists()


def test_a_set_that_shrinks_costs_the_metrics_it_is_too_small_for_and_no_other(tmp_path, sets, capsys):
    for name in ("x.png", "y.png"):
        (Path(sets[0]) / name).write_text("no image", encoding="utf-8")
    code, output = evaluate(
        tmp_path, "--generated", sets[0], "--reference", sets[1], "--extractor", TOY, "--allow_small",
        "--skip_bad", "--metrics", "vendi,kid_subsets,fid", "--metric_options", "kid_subsets.size=7",
    )  # fmt: skip
    record = read_record(output)
    assert code == 1
    assert {score.metric for score in record.scores} == {"vendi", "fid"}
    assert "subsets of 7 images" in record.refused[f"a: kernel_distance_subsets[{TOY}]"]
    assert "error: a: kernel_distance_subsets" in capsys.readouterr().err


def test_a_metric_that_raises_anything_costs_itself(tmp_path, sets, capsys, monkeypatch):
    def fails(*arguments, **options):
        raise ZeroDivisionError("by zero")

    monkeypatch.setitem(METRICS, "vendi", dataclasses.replace(METRICS["vendi"], estimate=fails))
    code, output = evaluate(
        tmp_path, "--generated", sets[0], "--reference", sets[1], "--extractor", TOY, "--allow_small"
    )
    assert code == 1
    assert "vendi" not in {score.metric for score in read_record(output).scores}
    assert "ZeroDivisionError: by zero" in capsys.readouterr().err


def test_nothing_computed_is_an_error_before_the_work(tmp_path, sets, capsys):
    Toy.images_seen = 0
    code, output = evaluate(tmp_path, "--generated", sets[0], "--reference", sets[1], "--extractor", TOY)
    assert code == 2
    shown = capsys.readouterr()
    assert "too few images; nothing was computed" in shown.err
    assert "|" not in shown.out
    assert Toy.images_seen <= 20  # blank images, to learn the width of the features
    assert not output.parent.exists()


def test_a_set_that_cannot_be_read_costs_itself(tmp_path, sets, capsys):
    other = write_images(tmp_path / "b", 6, first=20)
    (other / "bad.png").write_text("no image", encoding="utf-8")
    code, output = evaluate(
        tmp_path, "--generated", other, sets[0], "--reference", sets[1], "--extractor", TOY, "--allow_small",
        "--metrics", "vendi",
    )  # fmt: skip
    assert code == 1
    assert [score.generated for score in read_record(output).scores] == ["a"]
    assert "bad.png" in capsys.readouterr().err


def test_metrics_that_statistics_cannot_serve_are_refused_by_name(tmp_path, sets, capsys):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(16), sigma=np.eye(16))
    basis = ["--extractor", TOY, "--allow_small"]
    with_statistics = ["--generated", sets[0], "--reference", tmp_path / "stats.npz", *basis]
    assert evaluate(tmp_path, *with_statistics, "--metrics", "fid,precision_recall")[0] == 2
    assert "precision_recall cannot be computed: the --reference holds statistics" in capsys.readouterr().err
    code, output = evaluate(tmp_path, *with_statistics, "--metrics", "fid")
    assert (code, len(read_record(output).scores)) == (0, 1)
    assert evaluate(tmp_path, "--generated", tmp_path / "stats.npz", "--reference", sets[1], *basis)[0] == 2
    assert "holds statistics of images, which serve as a --reference alone" in capsys.readouterr().err


def test_copies_of_the_reference_can_be_scored(tmp_path, sets):
    repeated = write_images(tmp_path / "repeated", 6)
    for number in range(4):  # a image that stands more than k times in the reference
        shutil.copy(repeated / "image-000.png", repeated / f"again-{number}.png")
    code, output = evaluate(
        tmp_path, "--generated", repeated, "--reference", repeated, "--extractor", TOY, "--allow_small",
        "--allow_overlap", "--metrics", "fid",
    )  # fmt: skip
    assert code == 0
    rows = read_record(output).images
    repeats = [row for row in rows if row.name.startswith("again") or row.name == "image-000.png"]
    assert {row.values["realism"] for row in repeats} == {math.inf}
    json.loads(
        output.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )


def test_links_out_of_a_set_are_followed_when_asked_for(tmp_path, sets):
    subset = tmp_path / "subset"
    subset.mkdir()
    for path in sorted(Path(sets[0]).iterdir())[:5]:
        (subset / path.name).symlink_to(path)
    basis = ["--generated", subset, "--extractor", TOY, "--allow_small", "--metrics", "vendi"]
    assert evaluate(tmp_path, *basis)[0] == 2
    code, output = evaluate(tmp_path, *basis, "--follow_links")
    assert (code, read_record(output).sets["subset"].count) == (0, 5)


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
    pipe = open_frozen_pipeline(str(base))
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


@pytest.mark.slow
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


@pytest.mark.parametrize("family", ["flux2_klein", "pixart_sigma"])
@pytest.mark.slow
def test_adapters_of_a_transformer_family(tmp_path, tmp_path_factory, family):
    base = tiny_base(family, tmp_path_factory)
    pipe = open_frozen_pipeline(str(base))
    adapter = da.attach(pipe, da.make_method("lora", rank=2), targets="attention")
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    file = tmp_path / "one.safetensors"
    da.save(adapter, file, base=str(base), metadata={"resolution": "32"})
    code, output = evaluate(
        tmp_path, "--adapters", file, "--with_base", "--prompt", "a cat", *DRAWING, "--extractor", TOY,
        "--metrics", "vendi", "--allow_small", "--no_intervals", "--keep_images", tmp_path / "kept",
    )  # fmt: skip
    assert code == 0
    record = read_record(output)
    assert {score.generated for score in record.scores} == {"base", "one"}
    assert record.sets["base"].fingerprint != record.sets["one"].fingerprint
    assert Image.open(tmp_path / "kept" / "one" / "000000-seed5.png").size == (32, 32)


def test_images_that_are_not_kept_are_removed_and_the_same(tmp_path, trained, monkeypatch):
    run = trained
    folders = []
    monkeypatch.setattr(
        image_quality, "generate_sets", lambda a, f, folder: folders.append(folder) or DRAW(a, f, folder)
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


DRAW = image_quality.generate_sets


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

    monkeypatch.setattr(generated_files, "PartialState", FourProcesses)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match=r"several machines .* --keep_images"),
        generated_files.temporary_folder(),
    ):
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
    assert list(label_sets(["x/a", "y/a", "b.zip", "reference", "y/a"])) == [
        "a",
        "y-a",
        "b",
        "reference-2",
        "y-a-2",
    ]
    files = [
        AdapterFile(path, 1.0) for path in ("r/cat.safetensors", "r/dog.safetensors", "r/base.safetensors")
    ]
    assert list(label_adapters(files)) == ["cat", "dog", "base-2"]
    same = [AdapterFile(f"{folder}/adapter.safetensors", 1.0) for folder in ("one", "two")]
    assert list(label_adapters(same)) == ["one", "two"]
