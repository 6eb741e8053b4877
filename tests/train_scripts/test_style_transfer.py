"""train_scripts/style_transfer.py from the command line to the pictures, on tiny random bases."""

import json
import os
import signal
from pathlib import Path

import datasets
import pytest
import torch
from helpers.pipelines import tiny_clip, tiny_sd_pipeline, tiny_sdxl_pipeline, write_pictures
from helpers.scripts import runner, stop_after
from helpers.tiny_bases import SIDE, tiny_base
from safetensors.torch import load_file

import diffadapt as da

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "train_scripts" / "style_transfer.py"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the script in this process. Returns its exit code."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return runner("style_transfer", monkeypatch)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd_pipeline(tmp_path_factory.mktemp("base"))


def captioned(folder, count=4, size=(40, 40)):
    """A folder of pictures with metadata.jsonl."""
    write_pictures(folder, count, size=size)
    rows = [{"file_name": f"picture-{i}.png", "text": f"disc {i}"} for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def arguments(base, output, *, pictures=0, steps=2):
    """The options every run here has."""
    return [
        *("--pretrained_model_name_or_path", base, "--output_dir", output),
        *("--mixed_precision", "no", "--num_threads", 1, "--rank", 2, "--center_crop"),
        *("--num_validation_images", pictures, "--num_inference_steps", 2, "--export_formats", "none"),
        *("--train_batch_size", 2, "--max_train_steps", steps, "--learning_rate", "1e-2"),
    ]


def losses(folder):
    return [
        json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_held_out_captions_are_drawn_before_and_after_and_measured(run, tmp_path, base, capsys):
    clip = tiny_clip(tmp_path / "clip")
    data, others = captioned(tmp_path / "data"), captioned(tmp_path / "others", 5)
    fixed = arguments(base, tmp_path / "out", pictures=3)
    code = run(*fixed, "--train_data_dir", data, "--validation_data_dir", others, "--extractor", clip)
    assert code == 0
    record, shown = (
        json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8")),
        capsys.readouterr().out,
    )
    names = ["held_out_loss", *(f"{n}[{clip}]" for n in ("similarity_to_real", "text_agreement"))]
    assert [*names, f"frechet_distance[{clip}]"] == list(record["figures"])
    assert all(set(values) == {"before", "after"} for values in record["figures"].values())
    assert record["figures"]["held_out_loss"]["before"] != record["figures"]["held_out_loss"]["after"]
    assert not record["demo"]
    assert len(list((tmp_path / "out" / "samples" / "after").iterdir())) == 3
    assert (tmp_path / "out" / "grid.png").stat().st_size > 10_000
    assert "4 images, 32 pixels, encoded once" in shown
    assert f"diffadapt sample --adapter {tmp_path}/out/adapter.safetensors --prompt 'disc 0'" in shown


def test_without_held_out_pictures_the_trained_captions_are_drawn(run, tmp_path, base, capsys):
    data, fixed = captioned(tmp_path / "data"), arguments(base, tmp_path / "out", pictures=2)
    assert run(*fixed, "--train_data_dir", data, "--trigger_word", "sks") == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["figures"] == {}
    shown = capsys.readouterr().out
    assert "trigger word 'sks'" in shown
    assert "--prompt 'sks disc" in shown
    again = ("--overwrite_output_dir", "--validation_prompt", "a cat")
    assert run(*fixed, "--train_data_dir", data, *again) == 0
    assert "--prompt 'a cat'" in capsys.readouterr().out


def test_a_saved_data_set_a_folder_and_both_ways_of_streaming_train_alike(run, tmp_path, base):
    data = captioned(tmp_path / "data", 4)
    datasets.load_dataset("imagefolder", data_dir=str(data))["train"].save_to_disk(tmp_path / "saved")
    columns = ("--image_column", "image", "--caption_column", "text")
    ways = {
        "folder": ("--train_data_dir", data),
        "streamed folder": ("--train_data_dir", data, "--streaming"),
        "saved": ("--dataset_name", tmp_path / "saved", *columns),
        "streamed": ("--dataset_name", data, "--streaming", "--shuffle_buffer", 4),
    }
    found = {}
    for name, options in ways.items():
        assert run(*arguments(base, tmp_path / name), *options) == 0
        found[name] = losses(tmp_path / name)
    assert found["folder"] == found["streamed folder"] == found["saved"]
    assert found["streamed"] != found["folder"]  # in blocks, so in another order
    assert run(*arguments(base, tmp_path / "out"), *ways["saved"], "--max_train_samples", 1) == 0
    assert losses(tmp_path / "out") != found["saved"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--caption_column", "words"), "has no column 'words'; --caption_column is one of: file_name, text"),
        (("--dataset_name", "x"), "--train_data_dir or --dataset_name, not both"),
        (("--caption_dropout", "2"), "share between 0 and 1"),
        (("--cache_latents", "disk"), "--cache_dir FOLDER belong together"),
        (("--aspect_ratio_buckets", "44,40"), "this base needs multiples of 8"),
        (("--aspect_ratio_buckets", "auto", "--streaming"), "do not go together"),
        (("--streaming", "--cache_latents", "memory"), "larger than memory"),
        (("--no-center_crop", "--cache_latents", "memory"), "add --center_crop"),
    ],
)
def test_mistakes_are_told_in_words_before_training(run, tmp_path, base, capsys, options, message):
    data = captioned(tmp_path / "data", 2, size=(48, 40))
    assert run(*arguments(base, tmp_path / "out"), "--train_data_dir", data, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_a_base_without_data_shows_the_full_command(run, base, capsys):
    assert run("--pretrained_model_name_or_path", base) == 2
    errors = capsys.readouterr().err
    assert "--train_data_dir is missing" in errors
    assert "accelerate launch --config_file accelerate_config.yaml train_scripts/style_transfer.py" in errors


def test_a_resume_with_every_option_of_the_data_ends_in_the_same_bits(run, tmp_path, base):
    data = captioned(tmp_path / "data", 5, size=(64, 40))
    fixed = [
        *("--train_data_dir", data, "--caption_dropout", "0.3", "--trigger_word", "sks", "--random_flip"),
        *(
            "--aspect_ratio_buckets",
            "32,32;24,40",
            "--cache_latents",
            "disk",
            "--cache_dir",
            tmp_path / "kept",
        ),
        *("--noise_offset", "0.1", "--lr_scheduler", "constant"),
    ]
    assert run(*arguments(base, tmp_path / "whole", steps=4), *fixed) == 0
    assert len(list((tmp_path / "kept").glob("*/*.safetensors"))) == 2 * 5 + 5 + 1
    assert run(*arguments(base, tmp_path / "part", steps=2), *fixed, "--checkpointing_steps", 2) == 0
    resumed = [*arguments(base, tmp_path / "part", steps=4), "--resume_from_checkpoint", "latest"]
    assert run(*resumed, *fixed) == 0
    whole, part = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(value, part[name]) for name, value in whole.items())
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def test_a_resumed_stream_ends_in_the_same_bits(run, tmp_path, base):
    data = captioned(tmp_path / "data", 5)
    fixed = ["--dataset_name", data, "--streaming", "--shuffle_buffer", 3, "--lr_scheduler", "constant"]
    assert run(*arguments(base, tmp_path / "whole", steps=4), *fixed) == 0  # 8 of 5 pictures: a second epoch
    assert run(*arguments(base, tmp_path / "part", steps=3), *fixed, "--checkpointing_steps", 3) == 0
    resumed = [*arguments(base, tmp_path / "part", steps=4), "--resume_from_checkpoint", "latest"]
    assert run(*resumed, *fixed) == 0
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


@pytest.mark.parametrize("streamed", [False, True])
def test_after_sigterm_a_resume_ends_in_the_same_bits(run, tmp_path, base, monkeypatch, capsys, streamed):
    data = captioned(tmp_path / "data", 5)
    source = ["--dataset_name", data, "--streaming", "--shuffle_buffer", 3]
    fixed = [*(source if streamed else ["--train_data_dir", data]), "--caption_dropout", "0.3", "--use_ema"]
    whole, stopped = (arguments(base, tmp_path / name, steps=4) for name in ("whole", "stopped"))
    assert run(*whole, *fixed) == 0
    with monkeypatch.context() as patched:
        stop_after(1, signal.SIGTERM, patched)
        assert run(*stopped, *fixed) == 128 + signal.SIGTERM
    assert "the same command with --resume_from_checkpoint latest" in "".join(capsys.readouterr())
    left = {path.name for path in (tmp_path / "stopped").iterdir()}
    assert left == {"checkpoint-2", "config.yaml", "log.jsonl"}  # the step it fell into was finished
    assert run(*stopped, *fixed, "--resume_from_checkpoint", "latest") == 0
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_dry_run_shows_the_summary_and_writes_nothing(run, tmp_path, base, capsys):
    data = captioned(tmp_path / "data", 3)
    fixed = arguments(base, tmp_path / "out", pictures=2)
    assert run(*fixed, "--train_data_dir", data, "--validation_data_dir", data, "--dry_run") == 0
    shown = capsys.readouterr().out
    assert "  data     3 images" in shown
    assert "  memory   about " in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["sd", "z_image", "sd3"])
def test_accumulation_fills_the_same_buckets_as_a_large_batch(run, tmp_path, tmp_path_factory, family):
    base = tiny_base(family, tmp_path_factory)
    data = captioned(tmp_path / "a", 5, size=(64, 40))
    sizes = ["--resolution", SIDE, "--aspect_ratio_buckets", "32,32;32,48"]
    fixed = ["--train_data_dir", data, *sizes, "--max_grad_norm", "1e-3"]
    assert run(*arguments(base, tmp_path / "one"), *fixed) == 0
    halves = ["--train_batch_size", 1, "--gradient_accumulation_steps", 2]
    assert run(*arguments(base, tmp_path / "two"), *fixed, *halves) == 0
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)


def test_sdxl_is_trained_by_the_same_script(run, tmp_path):
    data, base = captioned(tmp_path / "data", 3, size=(48, 40)), tiny_sdxl_pipeline(tmp_path / "base")
    fixed = [*arguments(base, tmp_path / "out", pictures=1), "--train_data_dir", data]
    assert run(*fixed, "--random_flip", "--caption_dropout", "0.5", "--aspect_ratio_buckets", "auto") == 0
    assert (tmp_path / "out" / "grid.png").exists()


def test_without_arguments_it_is_the_demonstration_and_says_so(run, tmp_path, capsys):
    short = ["--max_train_steps", 1, "--num_validation_images", 2, "--num_inference_steps", 1]
    few = ["--max_train_samples", 8, "--validation_data_dir", captioned(tmp_path / "others", 3)]
    assert run("--output_dir", tmp_path / "out", *short, *few, "--num_threads", 1) == 0
    record, shown = (
        json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8")),
        capsys.readouterr().out,
    )
    assert record["demo"]
    assert record["options"]["pretrained_model_name_or_path"] == "embedded:emoji"
    assert {"held_out_loss", "similarity_to_real[embedded:clip]"} <= set(record["figures"])
    assert "8 images" in shown
    assert "DEMO" in shown
    assert "accelerate launch --config_file accelerate_config.yaml train_scripts/style_transfer.py" in shown
    assert record["options"]["train_data_dir"] == "embedded:style/fluent3d/train"
    assert "DEMO" in da.read_metadata(tmp_path / "out" / "adapter.safetensors")["note"]
    assert "grid.png" in os.listdir(tmp_path / "out")
