"""Both scripts of captions on every transformer family, from the command line to the images of the file.

Every option runs on at least two families, and every family with several options.
"""

import json
import re

import datasets
import pytest
import torch
from helpers.family_pipelines import FAMILIES
from helpers.pipelines import write_pictures
from helpers.scripts import runner
from helpers.tiny_bases import SIDE, tiny_base
from PIL import Image
from safetensors.torch import load_file

from diffadapt.cli.main import main as diffadapt

pytestmark = pytest.mark.slow

PROMPT = "a photo of sks dog"
CAPTIONS = ("a disc", "a disc of many colours on white", "disc", "a large, bright disc")
BF16 = ("--base_precision", "bf16", "--mixed_precision", "bf16")
TEXT = ("--train_text_encoder", "--text_encoder_lr", "1e-2")
VALIDATION = ("--validation_steps", 1)
ACCUMULATION = ("--gradient_accumulation_steps", 2)
TIMES = ("--timestep_density", "uniform", "--timestep_shift", 2)
# family -> options beside those that every run has
DREAMBOOTH_OPTIONS = {
    "sd3": (*TEXT, "--gradient_checkpointing"),
    "sd35_medium": (*BF16, *TIMES),
    "sd3_without_t5": TEXT,
    "flux": (*TEXT, *VALIDATION, *ACCUMULATION),
    "flux_schnell": BF16,
    "flux2_klein": (*VALIDATION, "--use_ema"),
    "flux2_dev": ("--gradient_checkpointing", *VALIDATION),
    "qwen_image": (*BF16, "--gradient_checkpointing"),
    "z_image": (*TIMES, *BF16),
    "krea2": (*ACCUMULATION, "--use_ema"),
    "chroma": (*VALIDATION, "--gradient_checkpointing"),
    "pixart_sigma": ("--snr_gamma", 5, "--noise_offset", 0.1, *ACCUMULATION),
}
DISK = ("--cache_latents", "disk", "--cache_dir")
STYLE_OPTIONS = {
    "sd3": ("--train_text_encoder", "--random_flip"),
    "flux": DISK,
    "flux2_klein": ("--random_flip", *DISK),
    "flux2_dev": DISK,
    "qwen_image": DISK,
    "z_image": ("--cache_latents", "none"),
    "krea2": ("--gradient_checkpointing",),
    "chroma": BF16,
    "pixart_sigma": (*BF16, "--gradient_checkpointing"),
}


def common(base, output, *, steps=2):
    return [
        *("--pretrained_model_name_or_path", base, "--output_dir", output, "--resolution", SIDE),
        *("--train_batch_size", 2, "--max_train_steps", steps, "--learning_rate", "0.3"),
        *("--num_inference_steps", 2, "--num_validation_images", 1, "--num_threads", 1),
    ]


def pixels(path):
    return torch.tensor(list(Image.open(path).tobytes())).int()


def sample(adapter, out, *arguments):
    settings = ["--num_images", "1", "--num_inference_steps", "2", "--out", str(out)]
    assert diffadapt(["sample", "--adapter", str(adapter), *settings, *arguments]) == 0
    return pixels(out / "000-seed0.png")


@pytest.mark.parametrize("family", FAMILIES)
def test_dreambooth_ends_in_a_file_that_gives_its_images(
    family, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    base = tiny_base(family, tmp_path_factory)
    instances = write_pictures(tmp_path / "mine", 3, size=(48, 40))
    # One caption is longer than the others, and than that of the class.
    (instances / "picture-0.txt").write_text(f"{PROMPT} on a very long beach", encoding="utf-8")
    prior = [
        *("--with_prior_preservation", "--class_prompt", "a dog", "--num_class_images", 2),
        *("--class_data_dir", write_pictures(tmp_path / "class", 2)),
    ]
    data = ["--instance_data_dir", instances, "--instance_prompt", PROMPT, "--instance_captions"]
    options = [*prior, *DREAMBOOTH_OPTIONS[family], "--adapter", "lora(rank=2)"]
    out = tmp_path / "out"
    assert runner("dreambooth", monkeypatch)(*common(base, out), *data, *options) == 0
    assert "3 images, 2 class images, 32 pixels" in capsys.readouterr().out
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert "failures" not in record
    images = {when: pixels(out / "samples" / when / "subject-00.png") for when in ("before", "after")}
    assert len(images["after"]) == 3 * SIDE * SIDE
    assert (images["after"] - images["before"]).abs().max() > 2
    assert {value.dtype for value in load_file(out / "adapter.safetensors").values()} == {torch.float32}
    if "--validation_steps" in options:
        validated = pixels(out / "validation" / "step-2" / "000-seed0.png")
        assert len(validated) == 3 * SIDE * SIDE
    if "bf16" not in options:  # `diffadapt sample` holds the base in float32
        again = sample(out / "adapter.safetensors", tmp_path / "again", "--prompt", PROMPT)
        assert (images["after"] - again).abs().max() <= 2


@pytest.mark.parametrize("family", STYLE_OPTIONS)
def test_style_transfer_with_sizes_captions_of_unequal_lengths_and_a_resume(
    family, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    base = tiny_base(family, tmp_path_factory)
    data = write_pictures(tmp_path / "data", 4, size=(60, 40))
    for caption, path in zip(CAPTIONS, sorted(data.glob("*.png")), strict=True):
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    options = list(STYLE_OPTIONS[family])
    if "--cache_dir" in options:
        options.append(tmp_path / "cache")
    options += [
        *("--train_data_dir", data, "--validation_data_dir", data, "--trigger_word", "sks"),
        *("--caption_dropout", 0.3, "--aspect_ratio_buckets", "32,48;32,32"),
        *("--adapter", "flora(rank=2)"),
    ]
    run = runner("style_transfer", monkeypatch)
    whole = tmp_path / "whole"
    assert run(*common(base, whole, steps=3), *options) == 0
    shown = capsys.readouterr().out
    assert "4 of 32 x 48" in shown
    assert "30% without caption, trigger word 'sks'" in shown
    record = json.loads((whole / "run.json").read_text(encoding="utf-8"))
    assert "failures" not in record
    loss = record["figures"]["held_out_loss"]
    assert loss["before"] != loss["after"]

    part = tmp_path / "part"
    quiet = ["--num_validation_images", 0]
    first_two = ["--max_train_steps", 2, "--lr_scheduler", "constant"]
    assert run(*common(base, part), *options, *quiet, *first_two) == 0
    assert run(*common(base, part, steps=3), *options, *quiet, "--resume_from_checkpoint", "latest") == 0
    expected = load_file(whole / "adapter.safetensors")
    resumed = load_file(part / "adapter.safetensors")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


@pytest.mark.parametrize("family", ["z_image", "chroma"])
def test_a_streamed_data_set_trains_as_a_folder_does(family, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    base = tiny_base(family, tmp_path_factory)
    data = write_pictures(tmp_path / "data", 3, size=(SIDE, SIDE))
    for caption, path in zip(CAPTIONS, sorted(data.glob("*.png")), strict=False):
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    run = runner("style_transfer", monkeypatch)
    weights = []
    for name, options in (("folder", []), ("streamed", ["--streaming"])):
        arguments = [*common(base, tmp_path / name), "--train_data_dir", data, "--num_validation_images", 0]
        assert run(*arguments, *options) == 0
        weights.append(load_file(tmp_path / name / "adapter.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("family", ["sd3", "pixart_sigma"])
def test_missing_class_images_are_generated_by_the_base(family, tmp_path, tmp_path_factory, monkeypatch):
    base = tiny_base(family, tmp_path_factory)
    data = ["--instance_data_dir", write_pictures(tmp_path / "mine", 2), "--instance_prompt", PROMPT]
    prior = ["--with_prior_preservation", "--class_prompt", "a dog", "--num_class_images", 2]
    out = tmp_path / "out"
    quiet = ["--num_validation_images", 0]
    assert runner("dreambooth", monkeypatch)(*common(base, out), *data, *prior, *quiet) == 0
    images = [Image.open(path) for path in sorted((out / "class_images").glob("*.png"))]
    assert [image.size for image in images] == [(64, 64), (64, 64)]  # the base's own size


@pytest.mark.parametrize(
    ("pipeline", "option"),
    [
        ("FluxPipeline", ("--snr_gamma", 5)),
        ("ZImagePipeline", ("--noise_offset", 0.1)),
        ("StableDiffusion3Pipeline", ("--prediction_type", "epsilon")),
        ("QwenImagePipeline", ("--train_text_encoder",)),
        ("PixArtSigmaPipeline", ("--timestep_shift", 3)),
    ],
)
def test_options_that_do_not_apply_are_refused_before_the_base_is_loaded(
    pipeline, option, tmp_path, monkeypatch, capsys
):
    base = tmp_path / "base"
    base.mkdir()  # there is nothing to load
    (base / "model_index.json").write_text(json.dumps({"_class_name": pipeline}), encoding="utf-8")
    data = ["--instance_data_dir", write_pictures(tmp_path / "mine", 1), "--instance_prompt", PROMPT]
    assert runner("dreambooth", monkeypatch)(*common(base, tmp_path / "out"), *data, *option) == 2
    error = capsys.readouterr().err
    assert option[0] in error
    assert any(reason in error for reason in ("flow", "betas", "language model"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["flux2_klein", "krea2"])
def test_a_dry_run_counts_the_memory_of_each_stage_and_writes_nothing(
    family, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    base = tiny_base(family, tmp_path_factory)
    data = ["--instance_data_dir", write_pictures(tmp_path / "mine", 2), "--instance_prompt", PROMPT]
    assert runner("dreambooth", monkeypatch)(*common(base, tmp_path / "out"), *data, "--dry_run") == 0
    shown = capsys.readouterr().out
    for stage in ("encode captions", "encode images", "train ", "sample "):
        assert re.search(rf"  {stage} *\d+\.\d [KMG]iB: models", shown)
    assert not (tmp_path / "out").exists()
