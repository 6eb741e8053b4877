"""The training scripts on tiny SDXL bases and on single files, to the files of other programs."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from helpers.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline, write_pictures
from helpers.scripts import runner
from helpers.sgm_layout import write_single_file
from PIL import Image

import diffadapt as da
from diffadapt.cli.main import main as diffadapt

pytestmark = pytest.mark.slow

PROMPT = "a photo of sks dog"
SMALL = [
    *("--num_inference_steps", "2", "--num_validation_images", "2"),
    *("--train_batch_size", "2", "--num_threads", "1"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    tiny_sdxl_pipeline(place / "base", vae="kl")
    write_pictures(place / "mine", 3, size=(48, 40))
    return place


def arguments(place, output, base):
    names = ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir")
    values = (base, place / "mine", PROMPT, output)
    return [
        *SMALL,
        *(part for name, value in zip(names, values, strict=True) for part in (f"--{name}", value)),
    ]


def pixels(path):
    return torch.tensor(list(Image.open(path).tobytes())).int()


@torch.no_grad()
def latents(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipe(PROMPT, generator=generator, num_inference_steps=2, output_type="latent").images


def test_dreambooth_with_text_encoders_gives_files_that_open_everywhere(place, tmp_path, capsys, monkeypatch):
    run, out = runner("dreambooth", monkeypatch), tmp_path / "out"
    text = [
        "--train_text_encoder",
        "--max_train_steps",
        3,
        "--learning_rate",
        "0.05",
        "--adapter",
        "lora(rank=2)",
    ]
    prior = ["--with_prior_preservation", "--class_prompt", "a photo of a dog", "--num_class_images", 2]
    formats = ["--export_formats", "kohya,diffusers", "--mixed_precision", "no"]
    assert run(*arguments(place, out, place / "base"), *text, *prior, *formats) == 0
    shown = capsys.readouterr().out
    assert "adapter_comfyui.safetensors: right in ComfyUI, A1111, LyCORIS" in shown
    sites = da.read_metadata(out / "adapter.safetensors")["adapter"]["sites"]
    assert {site["component"] for site in sites} == {"unet", "text_encoder", "text_encoder_2"}
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["options"]["resolution"] == 32

    asked = ["--prompt", PROMPT, "--num_images", "2", "--num_inference_steps", "2"]
    asked += ["--out", str(tmp_path / "again")]
    assert diffadapt(["sample", "--adapter", str(out / "adapter.safetensors"), *asked]) == 0
    first, second = pixels(out / "samples/after/subject-01.png"), pixels(tmp_path / "again/001-seed1.png")
    assert (first - second).abs().max() <= 2
    assert (first - pixels(out / "samples/before/subject-01.png")).abs().max() > 2

    ours = StableDiffusionXLPipeline.from_pretrained(place / "base")
    da.load(ours, out / "adapter.safetensors")
    for name in ("adapter_comfyui.safetensors", "adapter_diffusers.safetensors"):
        stock = StableDiffusionXLPipeline.from_pretrained(place / "base")
        stock.load_lora_weights(out, weight_name=name)
        assert (latents(stock) - latents(ours)).abs().max() < 1e-4, name


def test_a_single_checkpoint_trains_and_draws_with_another_autoencoder(place, tmp_path, monkeypatch):
    run = runner("dreambooth", monkeypatch)
    tiny_sd_pipeline(tmp_path / "folder", vae="kl")
    file = write_single_file(tmp_path / "folder", tmp_path / "base.safetensors")
    shutil.rmtree(tmp_path / "folder")
    out, vae = tmp_path / "out", ["--pretrained_vae_model_name_or_path", str(place / "base")]
    assert run(*arguments(place, out, file), "--max_train_steps", 2, *vae) == 0
    asked = [
        "--prompt",
        PROMPT,
        "--num_images",
        "1",
        "--num_inference_steps",
        "2",
        "--out",
        str(tmp_path / "again"),
    ]
    assert diffadapt(["sample", "--adapter", str(out / "adapter.safetensors"), *asked, *vae]) == 0
    first, second = pixels(out / "samples/after/subject-00.png"), pixels(tmp_path / "again/000-seed0.png")
    assert (first - second).abs().max() <= 2
    assert json.loads((tmp_path / "again" / "sample.json").read_text(encoding="utf-8"))["vae"] == vae[1]


def test_style_transfer_with_sizes_dropped_captions_and_text_encoders(place, tmp_path, monkeypatch, capsys):
    run, out, data = runner("style_transfer", monkeypatch), tmp_path / "out", tmp_path / "data"
    for picture in write_pictures(data, 4, size=(60, 40)).iterdir():
        picture.with_suffix(".txt").write_text(
            f"a picture named {picture.stem} of a small disc", encoding="utf-8"
        )
    fixed = [*SMALL, "--pretrained_model_name_or_path", place / "base", "--output_dir", out]
    given = ["--train_data_dir", data, "--aspect_ratio_buckets", "32,48;32,32", "--caption_dropout", "0.5"]
    rates = [
        "--max_train_steps",
        3,
        "--learning_rate",
        "0.05",
        "--train_text_encoder",
        "--adapter",
        "flora(rank=2)",
    ]
    assert run(*fixed, *given, *rates, "--mixed_precision", "no") == 0
    shown = capsys.readouterr().out
    assert "adapter_comfyui.safetensors: right in ComfyUI, A1111, LyCORIS" in shown
    assert "disc" in shown  # the end of the captions, which 24 tokens do not hold
    asked = ["--prompt", "a disc", "--num_images", "1", "--num_inference_steps", "2", "--compare"]
    again = tmp_path / "again"
    assert (
        diffadapt(["sample", "--adapter", str(out / "adapter.safetensors"), *asked, "--out", str(again)]) == 0
    )
    base, adapted = (pixels(path) for path in sorted((tmp_path / "again").glob("0*.png")))
    assert not torch.equal(base, adapted)
