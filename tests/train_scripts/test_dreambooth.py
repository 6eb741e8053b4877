"""train_scripts/dreambooth.py from the command line to the pictures, on tiny random bases."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from helpers.pipelines import tiny_clip, tiny_sd_pipeline, write_pictures
from helpers.quantised_kinds import QUANTISED, needs
from helpers.scripts import runner
from helpers.tiny_bases import SIDE, tiny_base
from huggingface_hub import RepoUrl
from PIL import Image
from safetensors.torch import load_file

import diffadapt as da
from diffadapt.cli.main import main as diffadapt
from diffadapt.models.families import load_base
from diffadapt.training import push_to_hub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_scripts" / "dreambooth.py"
PROMPT = "a photo of sks dog"


@pytest.fixture
def run(monkeypatch):
    """Runs the script in this process. Returns its exit code."""
    return runner("dreambooth", monkeypatch)


def arguments(tmp_path, output, **base):
    """The options every run here has."""
    if not (tmp_path / "base").exists():
        tiny_sd_pipeline(tmp_path / "base", **base)
        write_pictures(tmp_path / "mine", 3)
    return [
        *("--pretrained_model_name_or_path", tmp_path / "base"),
        *("--instance_data_dir", tmp_path / "mine"),
        *("--instance_prompt", PROMPT),
        *("--output_dir", tmp_path / output),
        *("--num_inference_steps", 2),
        *("--num_validation_images", 2),
        *("--train_batch_size", 2),
        *("--num_threads", 1),
    ]


@pytest.mark.parametrize(
    ("adapter", "vae", "prediction_type", "scheduler"),
    [
        ("flora", "kl", "epsilon", "pndm"),
        ("lora(rank=2)", "tiny", "v_prediction", "ddim"),
        ("flora", "tiny", "v_prediction", "ddpm"),
    ],
)
def test_a_run_leaves_everything_it_promises(run, tmp_path, capsys, adapter, vae, prediction_type, scheduler):
    base = {"vae": vae, "prediction_type": prediction_type, "scheduler": scheduler}
    fixed = arguments(tmp_path, "out", **base)
    assert run(*fixed, "--adapter", adapter, "--max_train_steps", 4, "--targets", "attention+conv") == 0
    out, (shown, bar) = tmp_path / "out", capsys.readouterr()
    assert re.search(r"loss \d\.\d+, lr \d\.\d\de-\d\d, \d+\.\d images/s, \d+\.\d GiB", bar)
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert record["parameters"] > 0
    assert record["seconds"] > 0
    assert record["peak_memory_bytes"] > 1e6
    assert not record["demo"]
    assert config["learning_rate"] == da.make_method("flora" if "flora" in adapter else "lora").learning_rate
    assert config["resolution"] == 32
    assert Image.open(out / "grid.png").width > 600
    assert len(list((out / "samples" / "after").iterdir())) == 4
    assert "DEMO" not in shown
    assert f"diffadapt sample --adapter {out}/adapter.safetensors" in shown
    assert f"{out}/adapter_comfyui.safetensors: right in ComfyUI, A1111, LyCORIS" in shown
    assert (out / "adapter_comfyui.safetensors").exists()
    da.load(load_base(str(tmp_path / "base")).pipe, out / "adapter.safetensors")


def test_pictures_of_the_run_equal_those_of_diffadapt_sample(run, tmp_path):
    fixed = [*arguments(tmp_path, "out"), "--sample_batch_size", 1]  # an image does not depend on its batch
    assert run(*fixed, "--adapter", "flora", "--max_train_steps", 3, "--learning_rate", "0.05") == 0
    again = ["--prompt", PROMPT, "--num_images", "2", "--num_inference_steps", "2"]
    again += ["--out", str(tmp_path / "again")]
    assert diffadapt(["sample", "--adapter", str(tmp_path / "out" / "adapter.safetensors"), *again]) == 0
    first, second = (
        torch.tensor(list(Image.open(path).tobytes())).int()
        for path in (tmp_path / "out/samples/after/subject-01.png", tmp_path / "again/001-seed1.png")
    )
    assert (first - second).abs().max() <= 2


def test_prior_preservation_makes_and_uses_class_pictures(run, tmp_path, capsys):
    prior = ["--with_prior_preservation", "--class_prompt", "a photo of a dog", "--num_class_images", 4]
    fixed = [*arguments(tmp_path, "out"), "--adapter", "lora", "--max_train_steps", 2]
    assert run(*fixed, *prior, "--prior_loss_weight", 0) == 0
    assert len(list((tmp_path / "out" / "class_images").glob("*.png"))) == 4
    assert "4 class images" in capsys.readouterr().out
    assert run(*fixed, "--with_prior_preservation") == 2
    assert "--with_prior_preservation needs --class_prompt" in capsys.readouterr().err


def test_pictures_of_a_subject_can_be_told_their_own_captions(run, tmp_path):
    fixed = [*arguments(tmp_path, "one"), "--max_train_steps", 2, "--num_validation_images", 0]
    (tmp_path / "mine" / "picture-0.txt").write_text("a photo of sks dog on a beach", encoding="utf-8")
    assert run(*fixed) == 0
    assert run(*fixed, "--output_dir", tmp_path / "two", "--instance_captions") == 0
    logs = [
        (tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines() for name in ("one", "two")
    ]
    one, two = ([json.loads(line)["loss"] for line in log] for log in logs)
    assert one != two  # a text file is used when asked for


def test_figures_are_made_with_the_named_extractor(run, tmp_path, capsys):
    clip = tiny_clip(tmp_path / "clip")
    assert run(*arguments(tmp_path, "out"), "--max_train_steps", 2, "--extractor", clip) == 0
    figures = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["figures"]
    names = (
        "subject_similarity",
        "context_similarity",
        "text_agreement",
        "nearest_training_image",
        "drift",
    )
    assert list(figures) == [f"{name}[{clip}]" for name in names]
    assert all(-1 <= value <= 2 for values in figures.values() for value in values.values())
    assert "subject_similarity" in capsys.readouterr().out


def test_without_arguments_it_is_the_demonstration_and_says_so(run, tmp_path, capsys):
    short = [
        "--max_train_steps",
        2,
        "--num_validation_images",
        2,
        "--num_inference_steps",
        2,
        "--num_threads",
        1,
    ]
    out = tmp_path / "out"
    assert run("--adapter", "flora", "--output_dir", out, *short) == 0
    record, shown = json.loads((out / "run.json").read_text(encoding="utf-8")), capsys.readouterr().out
    assert record["demo"]
    assert record["options"]["pretrained_model_name_or_path"] == "embedded:emoji"
    assert "subject_similarity[embedded:clip]" in record["figures"]
    assert "DEMO" in shown
    assert "DEMO" in (out / "config.yaml").read_text(encoding="utf-8")
    assert "DEMO" in da.read_metadata(out / "adapter.safetensors")["note"]
    again = ["--prompt", "a sks cat face emoji", "--num_images", "1", "--out", str(tmp_path / "again")]
    assert diffadapt(["sample", "--adapter", str(out / "adapter.safetensors"), *again]) == 0
    assert json.loads((tmp_path / "again" / "sample.json").read_text(encoding="utf-8"))["demo"]


def test_without_pictures_there_is_only_the_adapter(run, tmp_path, capsys):
    quiet = ("--num_validation_images", 0, "--export_formats", "none")
    assert run(*arguments(tmp_path, "out"), "--max_train_steps", 1, *quiet) == 0
    files = {"checkpoint-1", "adapter.safetensors", "run.json", "config.yaml", "log.jsonl", "README.md"}
    assert files == set(os.listdir(tmp_path / "out"))
    assert "grid.png" not in capsys.readouterr().out


def test_a_dry_run_shows_what_would_be_trained_and_writes_nothing(run, tmp_path, capsys):
    budget = ("--adapter", "lora", "--param_budget", "20k", "--targets", "attention+conv")
    assert run(*arguments(tmp_path, "out"), *budget, "--dry_run", "--train_batch_size", 3) == 0
    shown = capsys.readouterr().out
    count = int(re.search(r"([\d,]+) parameters \(", shown)[1].replace(",", ""))
    assert 10_000 < count <= 20_000
    for row in ("  memory   about ", "  data     3 images", "  batch    3 a step", "  steps    500, rate"):
        assert row in shown
    assert not (tmp_path / "out").exists()


def test_the_frozen_base_can_have_a_precision_of_its_own(run, tmp_path, capsys):
    sizes = []
    for precision in ("fp32", "bf16"):
        assert run(*arguments(tmp_path, "out"), "--dry_run", "--base_precision", precision) == 0
        sizes.append(float(re.search(r"base ([\d.]+) MiB", capsys.readouterr().out)[1]))
    assert 0.45 * sizes[0] < sizes[1] < 0.6 * sizes[0]  # the autoencoder stays in float32


@needs(QUANTISED["torchao-int8"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_base_is_smaller_and_trains(run, tmp_path, capsys, precision):
    sizes = []
    for choice in ("fp32", precision):
        assert run(*arguments(tmp_path, "out"), "--dry_run", "--base_precision", choice) == 0
        sizes.append(float(re.search(r"base ([\d.]+) MiB", capsys.readouterr().out)[1]))
    assert sizes[1] < 0.95 * sizes[0]
    options = ("--max_train_steps", 2, "--num_validation_images", 1, "--export_formats", "diffusers")
    assert run(*arguments(tmp_path, "out"), "--base_precision", precision, *options) == 0
    assert (tmp_path / "out" / "adapter_diffusers.safetensors").is_file()
    path = tmp_path / "out" / "adapter.safetensors"
    assert da.read_metadata(path)["adapter"]["base"]["quantisation"].startswith("torchao ")
    shown = capsys.readouterr().out
    assert "frozen, quantised (torchao " in shown
    (command,) = re.findall(r"diffadapt (sample --adapter .*)", shown)
    assert f"--base_precision {precision}" in command
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* was trained on")
        assert diffadapt([*shlex.split(command.replace("--num_images 16", "--num_images 1"))]) == 0
    record = (tmp_path / "out" / "more" / "sample.json").read_text(encoding="utf-8")
    assert json.loads(record)["base_precision"] == precision


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--transformer", "absent.gguf"), "absent.gguf: there is no such file"),
        (("--transformer", "weights.bin"), "give a .gguf or .safetensors file"),
        (("--base_precision", "int8", "--shard_base"), "--shard_base moves plain weights alone"),
        (("--base_precision", "fp8", "--offload_blocks", 1), "--offload_blocks moves plain weights alone"),
    ],
)
def test_what_a_quantised_base_cannot_do_is_said_first(run, tmp_path, capsys, options, message):
    assert run(*arguments(tmp_path, "out"), *options) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_encodes_no_more_than_it_shows_and_fills_no_cache(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffadapt.data.encoding.EncodedImages.prepare", None)  # a call would fail
    monkeypatch.setattr("diffadapt.data.encoding.EncodedCaptions.prepare", None)
    cache = ("--center_crop", "--cache_latents", "disk", "--cache_dir", tmp_path / "cache")
    assert run(*arguments(tmp_path, "out"), *cache, "--dry_run") == 0
    assert f"encoded once, kept in {tmp_path / 'cache'}" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_draws_no_class_pictures_but_counts_them(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffadapt.data.class_images.generate_in_stages", None)  # a call would fail
    there = write_pictures(tmp_path / "dogs", 1)
    prior = ["--with_prior_preservation", "--class_prompt", "a dog", "--num_class_images", 4, "--dry_run"]
    fixed = [*arguments(tmp_path, "out"), *prior, "--center_crop"]
    assert run(*fixed) == 0
    assert "3 images, 4 class images (4 of them still to be generated by the base)" in capsys.readouterr().out
    assert run(*fixed, "--class_data_dir", there) == 0
    shown = capsys.readouterr().out
    assert "4 class images (3 of them still to be generated by the base), 32 pixels, encoded once" in shown
    assert "  memory   about " in shown  # of a step with class pictures
    assert os.listdir(there) == ["picture-0.png"]
    assert not (tmp_path / "out").exists()


WATCHED = ("--validation_steps", 2, "--log_adapter_stats", 2, "--report_to", "tensorboard")
FURTHER = ("--use_ema", "--ema_decay", 0.5, "--snr_gamma", 5, "--noise_offset", 0.1, "--optimizer", "prodigy")


def test_what_is_watched_during_a_run_changes_no_bit_of_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(push_to_hub, "HfApi", None)  # nothing is sent: a call would fail
    fixed = [*arguments(tmp_path, "watched"), "--adapter", "flora", "--max_train_steps", 4, *FURTHER]
    out = tmp_path / "watched"
    assert run(*fixed, *WATCHED, "--logging_dir", tmp_path / "tracked") == 0
    assert run(*fixed, "--output_dir", tmp_path / "plain") == 0
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("watched", "plain"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ["change_norm" in line for line in lines] == [False, True, False, True]
    assert lines[3]["change_norm"] > lines[1]["change_norm"] > 0
    assert lines[3]["amplification"] > 0
    assert list((tmp_path / "tracked" / "diffadapt").glob("events.*"))
    assert sorted(path.name for path in (out / "validation").iterdir()) == ["step-2", "step-4"]


def test_pictures_in_between_are_those_of_the_file_that_is_saved_with_them(run, tmp_path):
    fixed = [*arguments(tmp_path, "out"), "--adapter", "flora", "--learning_rate", 0.05, "--use_ema"]
    assert run(*fixed, "--max_train_steps", 4, "--validation_steps", 3) == 0
    place, again = tmp_path / "out" / "validation" / "step-3", tmp_path / "again"
    options = ["--prompt", PROMPT, "--num_inference_steps", "2", "--num_images", "1", "--out", str(again)]
    assert diffadapt(["sample", "--adapter", str(place / "adapter.safetensors"), *options]) == 0
    drawn, before, later = (
        torch.tensor(list(Image.open(path).tobytes())).int()
        for path in (
            place / "000-seed0.png",
            tmp_path / "out" / "samples" / "before" / "subject-00.png",
            again / "000-seed0.png",
        )
    )
    assert (drawn - later).abs().max() <= 2
    assert (drawn - before).abs().max() > 2
    assert Image.open(place / "sheet.png").width > 100


def test_a_finished_run_is_uploaded_when_asked(run, tmp_path, monkeypatch, capsys):
    sent = {}

    class Api:
        def create_repo(self, name, private, **_):
            sent["private"] = private
            return RepoUrl(f"https://huggingface.co/me/{name}")

        def upload_folder(self, **options):
            sent.update(options, files=os.listdir(options["folder_path"]))
            return "https://huggingface.co/me/dog"

    monkeypatch.setattr(push_to_hub, "HfApi", Api)
    monkeypatch.setattr(push_to_hub, "get_token", lambda: "a token")
    upload = ("--push_to_hub", "--hub_model_id", "dog", "--hub_private", "--max_train_steps", 1)
    assert run(*arguments(tmp_path, "out"), *upload) == 0
    assert (sent["repo_id"], sent["private"]) == ("me/dog", True)
    assert {"README.md", "adapter.safetensors", "adapter_comfyui.safetensors", "grid.png"} <= set(
        sent["files"]
    )
    assert "uploaded: https://huggingface.co/me/dog" in capsys.readouterr().out


def test_an_unknown_export_format_is_named_before_the_run(run, tmp_path, capsys):
    assert run(*arguments(tmp_path, "out"), "--export_formats", "kohia") == 2
    assert "did you mean kohya" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_of_a_run_can_be_given_back_as_a_file(run, tmp_path):
    assert run(*arguments(tmp_path, "one"), "--adapter", "flora", "--max_train_steps", 3) == 0
    assert run("--config", tmp_path / "one" / "config.yaml", "--output_dir", tmp_path / "two") == 0
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "option",
    [
        ("--gradient_checkpointing",),
        ("--gradient_accumulation_steps", 2, "--train_batch_size", 1),
    ],
)
@pytest.mark.parametrize("family", ["sd", "qwen_image", "krea2", "chroma"])
def test_memory_options_change_no_result(run, tmp_path, tmp_path_factory, option, family):
    fixed = [
        *arguments(tmp_path, "one"),
        *("--pretrained_model_name_or_path", tiny_base(family, tmp_path_factory), "--resolution", SIDE),
        *("--adapter", "lora", "--max_train_steps", 1, "--max_grad_norm", "1e-3"),
        *("--num_validation_images", 0, "--instance_captions"),
    ]
    # In the step is a caption that is longer than the other, where a mask says what is padding.
    for picture in (tmp_path / "mine").glob("*.png"):
        picture.with_suffix(".txt").write_text(PROMPT[: 8 + 4 * int(picture.stem[-1])], encoding="utf-8")
    assert run(*fixed) == 0
    assert run(*fixed, "--output_dir", tmp_path / "two", *option) == 0
    one, two = (
        json.loads((tmp_path / name / "log.jsonl").read_text(encoding="utf-8")) for name in ("one", "two")
    )
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)
    if option == ("--gradient_checkpointing",):
        assert one["loss"] == two["loss"]
        assert one["grad_norm"] == two["grad_norm"]


def test_bf16_trains_float32_tensors(run, tmp_path):
    fixed = [*arguments(tmp_path, "out"), "--adapter", "flora", "--targets", "attention+conv"]
    assert run(*fixed, "--mixed_precision", "bf16", "--max_train_steps", 2) == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--adapter", "flor"), "unknown method 'flor'"),
        (("--adapter", "lora", "--rank", "0"), "rank must be a whole number >= 1"),
        (("--targets", "attenton"), "attenton"),
        (("--instance_data_dir", "nowhere"), "no folder 'nowhere'"),
        (("--pretrained_model_name_or_path", "./nowhere"), "no base model at './nowhere'"),
        (("--resume_from_checkpoint", "checkpoint-3"), "no checkpoint 'checkpoint-3'"),
        (("--mixed_precision", "fp16"), "--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no"),
        (("--optimizer", "adamwx"), "unknown optimizer 'adamwx'; did you mean adamw"),
        (("--report_to", "tensorbord"), "did you mean tensorboard"),
        (("--checkpointing_steps", -1), "--checkpointing_steps must be at least 0, got -1"),
    ],
)
def test_mistakes_are_told_in_words_before_training(run, tmp_path, capsys, wrong, message):
    assert run(*arguments(tmp_path, "out"), *wrong) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_a_base_without_data_shows_the_full_command(run, tmp_path, capsys):
    assert run("--pretrained_model_name_or_path", "base") == 2
    errors = capsys.readouterr().err
    assert "--instance_data_dir and --instance_prompt are missing" in errors
    assert "accelerate launch --config_file accelerate_config.yaml train_scripts/dreambooth.py" in errors


def test_after_sigterm_a_resume_ends_in_the_same_bits(run, tmp_path):
    fixed = [*arguments(tmp_path, "stopped"), "--adapter", "flora", "--max_train_steps", 60]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(SCRIPT), *map(str, fixed)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    log = tmp_path / "stopped" / "log.jsonl"
    deadline = time.monotonic() + 600  # a busy machine
    while (
        not (log.exists() and log.read_text(encoding="utf-8").count("\n") >= 3)
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors[-2000:]
    assert "--resume_from_checkpoint latest" in out + errors
    assert not (tmp_path / "stopped" / "run.json").exists()

    assert run(*fixed, "--resume_from_checkpoint", "latest") == 0
    assert run(*fixed, "--output_dir", tmp_path / "whole") == 0
    stopped, whole = (load_file(tmp_path / name / "adapter.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(value, whole[name]) for name, value in stopped.items())
    indices = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert indices == list(range(1, 61))


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the script kills by process handles of Linux")
def test_after_kills_at_random_moments_resumes_end_in_the_same_bits():
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "kill_and_resume.py"), "--kills", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith("2 kills, at steps [")
