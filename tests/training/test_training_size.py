"""The training size: which can be had, and that images are generated at it."""

from types import SimpleNamespace

import pytest
from diffusers.configuration_utils import FrozenDict
from helpers.class_pipelines import dit_pipeline
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import runner
from PIL import Image

from diffadapt.cli.main import main
from diffadapt.data.buckets import resolution_limits
from diffadapt.models.families import load_base
from diffadapt.training.setup import check_resolution

TINY_SIDE = 32  # pixels, of the tiny pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd_pipeline(tmp_path_factory.mktemp("base"))


def base_of(pixels_per_latent, side, **config):
    """What the check reads of a loaded base; `side` in latents."""

    config = FrozenDict({"sample_size": side, **config})
    denoiser = SimpleNamespace(config=config)
    return SimpleNamespace(denoiser=denoiser, resolution=pixels_per_latent * side, source="base")


STABLE_DIFFUSION = base_of(8, 64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768)
PIXEL_UNET = base_of(1, 32, block_out_channels=(16, 32, 64))
DIT = base_of(8, 32, patch_size=2)


@pytest.mark.parametrize(
    ("model", "limits"), [(STABLE_DIFFUSION, (8, 72)), (PIXEL_UNET, (4, 8)), (DIT, (16, 32))]
)
def test_the_sizes_of_a_base_follow_from_its_layers(model, limits):
    assert resolution_limits(model) == limits


@pytest.mark.parametrize("resolution", [8, 64, 500, 513])
def test_sizes_that_cannot_be_are_refused_with_one_that_can(resolution):
    with pytest.raises(ValueError, match=rf"--resolution {resolution}: .*multiples of 8 from 72 on, such as"):
        check_resolution(STABLE_DIFFUSION, resolution)


@pytest.mark.parametrize("resolution", [256, 320, 504, 512, 768, 1024])
def test_usual_sizes_are_taken(resolution):
    check_resolution(STABLE_DIFFUSION, resolution)


def test_the_check_reads_real_configurations(base, tmp_path):
    assert resolution_limits(load_base(str(base)))[0] == 4
    assert resolution_limits(load_base(str(dit_pipeline(tmp_path))))[0] > 1


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
