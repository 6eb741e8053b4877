"""train_scripts/class_conditional.py from the command line to the pictures; `diffadapt sample` of classes."""

import json
import shutil
import signal
from pathlib import Path

import datasets
import pytest
import torch
from helpers.class_pipelines import arguments, class_pipeline, dit_pipeline, write_classes
from helpers.pipelines import tiny_sd_pipeline
from helpers.scripts import runner, stop_after
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

import diffadapt as da
from diffadapt.cli.main import main as diffadapt
from diffadapt.data.examples import Example
from diffadapt.data.hub_tables import open_table, read_labelled_table
from diffadapt.evaluation.features.extractors import load_extractor
from diffadapt.models.open_pipeline import open_pipeline
from diffadapt.models.sampling import ImageRequest, SamplingConfig, generate_all
from diffadapt.training.report.class_mapping import match_by_name
from diffadapt.training.report.classes import ClassReport, class_metrics, class_requests, sample_examples
from diffadapt.training.report.held_out import center_pixels

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "train_scripts" / "class_conditional.py"


@pytest.fixture
def run(monkeypatch):
    """Runs the script in this process. Returns its exit code."""
    return runner("class_conditional", monkeypatch)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return class_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("pictures") / "train", side=8)


def test_a_run_on_class_folders_leaves_everything_it_promises(run, base, pictures, tmp_path, capsys):
    held_out = write_classes(tmp_path / "others", each=2)
    out = tmp_path / "out"
    more = {"train_data_dir": pictures, "held_out": held_out, "class_labels": "2,0,1", "validation_steps": 2}
    assert run(*arguments(base, out, extractor="embedded:digits", **more)) == 0
    shown = capsys.readouterr().out
    assert "9 images" in shown
    assert "10% without caption" in shown
    assert "--class_labels 2,0,1" in shown
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert list(record["figures"]) == [
        "held_out_loss",
        "frechet_distance[embedded:digits]",
        "class_agreement[embedded:digits]",
    ]
    assert record["figures"]["held_out_loss"]["before"] != record["figures"]["held_out_loss"]["after"]
    assert record["demo"] is False
    assert Image.open(out / "grid.png").width > 400
    assert (out / "validation" / "step-2" / "sheet.png").is_file()
    assert len(list((out / "samples" / "after").glob("*.png"))) == 4
    assert (out / "README.md").is_file()


def test_stopped_and_resumed_is_the_same_run(run, base, pictures, tmp_path):
    data = {"train_data_dir": pictures, "num_validation_images": 0, "lr_scheduler": "cosine"}
    assert run(*arguments(base, tmp_path / "whole", **data, checkpointing_steps=2)) == 0
    again = tmp_path / "whole" / "checkpoint-2"
    assert run(*arguments(base, tmp_path / "parts", **data, resume_from_checkpoint=again)) == 0
    whole, parts = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_a_saved_data_set_with_other_columns_and_the_loss_on_what_was_trained(run, base, tmp_path):
    rows = {"picture": [Image.new("RGB", (8, 8), (80 * n, 9, 9)) for n in range(3)], "digit": [0, 1, 2]}
    datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "data")
    more = {"image_column": "picture", "label_column": "digit", "num_validation_images": 0}
    out = tmp_path / "out"
    assert run(*arguments(base, out, dataset_name=tmp_path / "data", label_dropout=0, **more)) == 0
    assert list(json.loads((out / "run.json").read_text(encoding="utf-8"))["figures"]) == [
        "loss_on_training_pictures"
    ]
    alone = {**more, "num_validation_images": 1, "extractor": "embedded:digits", "max_held_out_samples": 2}
    assert run(*arguments(base, tmp_path / "one", dataset_name=tmp_path / "data", **alone)) == 0


def test_a_dit_learns_classes_with_one_table_for_all_blocks(run, pictures, tmp_path):
    base = dit_pipeline(tmp_path / "dit")
    more = {
        "train_data_dir": pictures,
        "class_labels": "207,0,999",
        "adapter": "lora(rank=2)+class_embedding",
    }
    assert run(*arguments(base, tmp_path / "out", resolution=16, **more)) == 0
    stored = load_file(tmp_path / "out" / "adapter.safetensors")
    assert sum(tuple(value.shape) == (1001, 16) for value in stored.values()) == 1
    assert (tmp_path / "out" / "grid.png").is_file()


def test_the_demonstration_says_so_and_lowers_the_loss_on_handwriting(run, tmp_path, capsys):
    small = ["--max_train_steps", 12, "--num_validation_images", 20, "--num_inference_steps", 4]
    out = tmp_path / "demo"
    assert run(*small, "--train_batch_size", 16, "--output_dir", out, "--num_threads", 1) == 0
    shown = capsys.readouterr().out
    assert "1400 images, 16 pixels" in shown
    assert "DEMO on an embedded base" in shown
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["demo"] is True
    assert record["method"].startswith("superlora")
    loss = record["figures"]["held_out_loss"]
    assert loss["after"] < loss["before"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_labels": "0,1"}, "one number for each of the 3 classes"),
        ({"class_labels": "0,1,3"}, "each must be another class of"),
        ({"class_labels": "0,1,1"}, "each must be another class of"),
        ({"class_labels": "a,b,c"}, "one number for each of the 3 classes"),
        ({"dataset_name": "some/set"}, "--train_data_dir or --dataset_name, not both"),
        ({"label_dropout": 2}, "a share between 0 and 1"),
    ],
)
def test_wrong_options_end_in_one_line(run, base, pictures, tmp_path, capsys, given, message):
    out = tmp_path / "out"
    assert run(*arguments(base, out, train_data_dir=pictures, **given)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_bases_told_words_are_refused(run, pictures, tmp_path, capsys):
    words = tiny_sd_pipeline(tmp_path / "words")
    assert run(*arguments(words, tmp_path / "out", train_data_dir=pictures)) == 2
    assert "is conditioned on captions, not classes" in capsys.readouterr().err


def test_a_dry_run_shows_the_summary_and_writes_nothing(run, base, pictures, tmp_path, capsys):
    fixed = arguments(base, tmp_path / "out", train_data_dir=pictures, held_out=pictures)
    assert run(*fixed, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert "  data     9 images" in shown
    assert "  memory   about " in shown
    assert not (tmp_path / "out").exists()


def test_after_sigterm_a_resume_ends_in_the_same_bits(run, base, pictures, tmp_path, monkeypatch):
    fixed = {"train_data_dir": pictures, "num_validation_images": 0}
    whole, stopped = (arguments(base, tmp_path / name, **fixed) for name in ("whole", "stopped"))
    assert run(*whole) == 0
    with monkeypatch.context() as patched:
        stop_after(1, signal.SIGTERM, patched)
        assert run(*stopped) == 128 + signal.SIGTERM
    assert not (tmp_path / "stopped" / "run.json").exists()
    assert run(*stopped, "--resume_from_checkpoint", "checkpoint-2") == 0
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_base_told_classes_has_no_text_encoder_to_train(run, base, pictures, tmp_path, capsys):
    fixed = arguments(base, tmp_path / "out", train_data_dir=pictures)
    assert run(*fixed, "--train_text_encoder") == 2
    said = capsys.readouterr().err
    assert "is conditioned on classes and has no text encoder; leave the option out" in said
    assert "+class_embedding" in said
    assert not (tmp_path / "out").exists()


def test_held_out_pictures_of_other_classes_are_refused(run, base, pictures, tmp_path, capsys):
    many = write_classes(tmp_path / "many", each=1, names=tuple("abcd"), side=8)
    assert run(*arguments(base, tmp_path / "out", train_data_dir=pictures, held_out=many)) == 2
    assert "--held_out has class 'a', which the training data does not have" in capsys.readouterr().err


def test_held_out_classes_are_matched_by_name(run, base, pictures, tmp_path):
    write_classes(tmp_path / "held", each=2, side=8)
    shutil.rmtree(tmp_path / "held" / "ant")
    report = {}

    def measure(self):
        report["captions"] = [example.caption for example in self.measured]
        raise ValueError("measured")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ClassReport, "before_training", measure)
        assert (
            run(*arguments(base, tmp_path / "out", train_data_dir=pictures, held_out=tmp_path / "held")) == 2
        )
    assert report["captions"] == [1, 1, 2, 2]  # bee and cat have labels 1 and 2, as in training


def test_names_of_a_data_set_are_matched_too(tmp_path):
    sets = match_by_name([Example(tmp_path, 0), Example(tmp_path, 1)], ["cow", "bee"], ["ant", "bee", "cow"])
    assert [example.caption for example in sets] == [2, 1]
    with pytest.raises(ValueError, match="did you mean bee"):
        match_by_name([Example(tmp_path, 0)], ["beee"], ["ant", "bee"])


def test_a_base_without_null_class_cannot_drop_labels(run, pictures, tmp_path, capsys):
    base = class_pipeline(tmp_path / "base", null_class=None)
    options = {"train_data_dir": pictures, "guidance_scale": 1}
    assert run(*arguments(base, tmp_path / "out", **options)) == 2
    assert "no null class" in capsys.readouterr().err
    assert run(*arguments(base, tmp_path / "out", **options, label_dropout=0)) == 0


def test_sample_draws_classes_as_the_pipeline_does(base, tmp_path, capsys):
    pipe = open_pipeline(str(base))
    adapter = da.attach(pipe, da.make_method("lora", rank=2), "attention")
    with torch.no_grad():
        for value in adapter.parameters():
            value.add_(0.3)
    da.save(adapter, tmp_path / "a.safetensors", base=str(base))
    options = [
        "--num_inference_steps",
        "3",
        "--guidance_scale",
        "2",
        "--num_images",
        "2",
        "--num_threads",
        "1",
    ]
    command = ["sample", "--adapter", str(tmp_path / "a.safetensors"), *options]
    assert diffadapt([*command, "--class_labels", "0,2", "--out", str(tmp_path / "drawn")]) == 0
    files = sorted((tmp_path / "drawn").glob("0*.png"))
    shots = [ImageRequest("", seed, label) for label in (0, 2) for seed in (0, 1)]
    expected = generate_all(pipe, shots, SamplingConfig(num_inference_steps=3, guidance_scale=2.0))
    drawn = torch.stack([pil_to_tensor(Image.open(file)) for file in files])
    assert (drawn - (expected * 255).round()).abs().max() <= 1
    assert diffadapt([*command, "--class_labels", "0,3", "--out", str(tmp_path / "wrong")]) == 2
    assert "no class 3" in capsys.readouterr().err


def test_of_many_pictures_the_same_few_of_every_class_are_measured():
    examples = [Example(Path(str(n)), n % 10) for n in range(1000)]  # an even stride would see one class
    chosen = sample_examples(examples, 100)
    assert chosen == sample_examples(examples, 100)
    assert len(set(chosen)) == 100
    assert {example.caption for example in chosen} == set(range(10))
    assert sample_examples(examples, 5000) == examples
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sample_examples(examples, 0)


def test_classes_are_drawn_in_turn_with_their_own_seeds():
    shots = class_requests([4, 7], ["ant", "bee"], count=5, seed=10)
    assert [shot.label for shot in shots] == [4, 7, 4, 7, 4]
    assert [shot.seed for shot in shots] == [10, 11, 12, 13, 14]
    assert shots[1].prompt == "class bee"


def test_figures_tell_handwriting_from_noise_and_count_recognised_digits():
    table = open_table(str(da.embedded("handwriting")), split="test")
    examples, _ = read_labelled_table(table, name="handwriting")
    real, labels = center_pixels(examples, 16), [example.caption for example in examples]
    noise = torch.rand(100, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = class_metrics(
        load_extractor("embedded:digits"),
        real=real[:200],
        labels=labels[200:300],
        before={"classes": noise},
        after={"classes": real[200:300]},
    )
    distance, agreement = (
        found["frechet_distance[embedded:digits]"],
        found["class_agreement[embedded:digits]"],
    )
    assert distance["after"] < 0.2 * distance["before"]
    assert agreement["after"] > 0.9
    assert agreement["before"] < 0.5
