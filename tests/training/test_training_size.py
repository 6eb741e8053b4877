"""The training size: which can be had, and that images are generated at it."""

from types import SimpleNamespace

import pytest
from diffusers.configuration_utils import FrozenDict
from helpers.class_pipelines import dit_pipeline
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import runner
from PIL import Image

from diffadapt.cli.main import main
from diffadapt.models.dit import DIFFUSION_TRANSFORMER, DiT
from diffadapt.models.families import load_base
from diffadapt.models.sd import STABLE_DIFFUSION as SD_PROFILE
from diffadapt.models.sd import StableDiffusion
from diffadapt.models.unet2d import UNET_2D, UNet2D
from diffadapt.training.setup import check_resolution

TINY_SIDE = 32  # pixels, of the tiny pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd_pipeline(tmp_path_factory.mktemp("base"))


def pipeline(denoiser_name, **config):
    """The parts of a pipeline that the check reads; latents have an eighth of the side of an image."""
    denoiser = SimpleNamespace(config=FrozenDict(config))
    vae = SimpleNamespace(config=FrozenDict(block_out_channels=(8, 8, 8, 8)))
    return SimpleNamespace(**{denoiser_name: denoiser}, vae=vae, vae_scale_factor=8)


UNET_OF_SD = pipeline(
    "unet", sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768
)
STABLE_DIFFUSION = StableDiffusion(UNET_OF_SD, "base", SD_PROFILE)
SMALL_UNET = pipeline("unet", sample_size=32, block_out_channels=(16, 32, 64))
PIXEL_UNET = UNet2D(SMALL_UNET, "base", UNET_2D)
DIT = DiT(pipeline("transformer", sample_size=32, patch_size=2), "base", DIFFUSION_TRANSFORMER)


@pytest.mark.parametrize(
    ("model", "limits"), [(STABLE_DIFFUSION, (8, 72)), (PIXEL_UNET, (4, 8)), (DIT, (16, 32))]
)
def test_the_sizes_of_a_base_follow_from_its_layers(model, limits):
    assert model.square_limits == limits


@pytest.mark.parametrize("resolution", [8, 64, 500, 513])
def test_sizes_that_cannot_be_are_refused_with_one_that_can(resolution):
    with pytest.raises(ValueError, match=rf"--resolution {resolution}: .*multiples of 8 from 72 on, such as"):
        check_resolution(STABLE_DIFFUSION, resolution)


@pytest.mark.parametrize("resolution", [256, 320, 504, 512, 768, 1024])
def test_usual_sizes_are_taken(resolution):
    check_resolution(STABLE_DIFFUSION, resolution)


def test_the_check_reads_real_configurations(base, tmp_path):
    assert load_base(str(base)).square_limits[0] == 4
    assert load_base(str(dit_pipeline(tmp_path))).square_limits[0] > 1


def test_images_have_the_training_size_in_a_run_and_when_sampling(base, tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "images", 2)
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": tmp_path / "images",
        "instance_prompt": "a sks dog",
        "adapter": "lora",
        "rank": 2,
        "targets": "attention",
        "max_train_steps": 1,
        "train_batch_size": 1,
        "mixed_precision": "no",
        "num_validation_images": 1,
        "num_inference_steps": 2,
        "export_formats": "none",
        "num_threads": 1,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    train = runner("dreambooth", monkeypatch)
    assert train(*arguments, "--resolution", 8, "--output_dir", tmp_path / "refused") == 2
    assert "--resolution 8:" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert train(*arguments, "--resolution", 2 * TINY_SIDE, "--output_dir", tmp_path / "run") == 0
    for path in (tmp_path / "run" / "samples").rglob("*.png"):
        assert Image.open(path).size == (2 * TINY_SIDE, 2 * TINY_SIDE)
    for flags, side in (((), 2 * TINY_SIDE), (("--height", "32", "--width", "32"), TINY_SIDE)):
        out = tmp_path / f"out-{side}"
        adapter = ("--adapter", str(tmp_path / "run" / "adapter.safetensors"))
        drawing = ("--prompt", "a dog", "--num_images", "1", "--num_inference_steps", "1", "--out", str(out))
        assert main(["sample", *adapter, *drawing, *flags]) == 0
        assert Image.open(next(out.glob("000-*.png"))).size == (side, side)
