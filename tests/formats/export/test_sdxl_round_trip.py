"""SDXL out and back: UNet and text encoders, through kohya's and diffusers' files, to the same images."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from helpers.method_cases import train
from helpers.pipelines import tiny_sdxl_pipeline

import diffadapt as da

SIZE = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sdxl_pipeline(tmp_path_factory.mktemp("sdxl"))


def opened(base):
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def latents(pipe):
    return pipe("a red fox", generator=torch.Generator().manual_seed(1), **SIZE).images


@pytest.fixture(scope="module")
def adapted(base):
    """An adapted pipeline, its adapter, and what it draws with and without."""
    pipe = opened(base)
    plain = latents(pipe)
    targets = "attention+*resnets*conv?+*samplers*conv"
    adapter = da.attach(pipe, da.LoRA(rank=2, alpha=3), targets, text_encoder_targets="all")
    train(adapter, 0.05)
    assert set(adapter.roots) == {"unet", "text_encoder", "text_encoder_2"}
    return adapter, latents(pipe), plain


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.slow
def test_an_exported_file_comes_back_as_the_same_weights(base, adapted, to, tmp_path):
    adapter, drawn, _ = adapted
    da.export(adapter, tmp_path / "file.safetensors", to)
    pipe = opened(base)
    back = da.load(pipe, tmp_path / "file.safetensors")
    assert {site.name for site in back.sites} == {site.name for site in adapter.sites}
    for site in adapter.sites:
        assert torch.allclose(back.adapted_weight(site.name), adapter.adapted_weight(site.name), atol=1e-6)
    assert (latents(pipe) - drawn).abs().max() < 1e-4


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.slow
def test_the_stock_pipeline_draws_the_same_from_the_file(base, adapted, to, tmp_path):
    adapter, drawn, plain = adapted
    report = da.export(adapter, tmp_path / "file.safetensors", to)
    assert "diffusers" in report.accepted_by
    stock = opened(base)
    stock.load_lora_weights(tmp_path, weight_name="file.safetensors")
    assert len(stock.get_list_adapters()) == 3  # unet, text_encoder, text_encoder_2
    assert (latents(stock) - drawn).abs().max() < 1e-4
    assert (drawn - plain).abs().max() > 1e-2


def test_kohya_s_names_tell_the_text_encoders_apart(adapted, tmp_path):
    from safetensors import safe_open

    adapter, _, _ = adapted
    da.export(adapter, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        keys = list(file.keys())
    first = {key for key in keys if key.startswith("lora_te1_text_model_encoder_layers_")}
    second = {key for key in keys if key.startswith("lora_te2_text_model_encoder_layers_")}
    unet = {key for key in keys if key.startswith("lora_unet_")}
    assert min(len(first), len(second), len(unet)) > 0
    assert len(first) + len(second) + len(unet) == len(keys)
