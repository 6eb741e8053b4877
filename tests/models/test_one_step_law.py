"""The acceptance test of every family: `predict` is what the stock pipeline computes in a sampling step.

The pipeline runs with its scheduler's `step` watched, which receives the sample and the model's output. Every
mistake in packing, position ids, masks, templates, signs, scales of time and guidance shows as a difference.
"""

from dataclasses import dataclass

import pytest
import torch
from helpers.class_pipelines import class_pipeline, dit_pipeline
from helpers.family_pipelines import FAMILIES, tiny_folder
from helpers.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline
from torch import Tensor

from diffadapt.models.families import load_base

CAPTIONS = ["a dog", "a much longer caption of a cat"]  # their text states differ in length
HEIGHT = 64
WIDTH = 96
WITHOUT_GUIDANCE = {  # family -> arguments of its pipeline; guidance_scale=1 for all others
    "qwen_image": {"true_cfg_scale": 1.0},
    "z_image": {"guidance_scale": 0.0},
    "krea2": {"guidance_scale": 0.0},
    "pixart_sigma": {"guidance_scale": 1.0, "negative_prompt": "", "use_resolution_binning": False},
}


@dataclass
class Step:
    """What one call of a scheduler's `step` got: the model's output, the time and the sample."""

    output: Tensor
    time: Tensor
    sample: Tensor


def sampling_steps(pipe, monkeypatch, **arguments) -> list[Step]:
    """Runs a pipeline without guidance and returns what its scheduler was given in each step."""
    steps = []
    original = pipe.scheduler.step

    def step(output, time, sample, *others, **options):
        steps.append(Step(output.clone(), time.clone(), sample.clone()))
        return original(output, time, sample, *others, **options)

    monkeypatch.setattr(pipe.scheduler, "step", step)
    pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), **arguments)
    return steps


def unpacked(pipe, value: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, N, D) of a pipeline as (B, C, h, w), by the pipeline's own function."""
    if value.dim() == 4:
        return value
    if type(pipe).__name__.startswith("Flux2"):
        positions = pipe._prepare_latent_ids(
            value.new_zeros(len(value), value.shape[-1], height // 16, width // 16)
        )
        return pipe._unpack_latents_with_ids(value, positions)
    factor = () if type(pipe).__name__ == "Krea2Pipeline" else (pipe.vae_scale_factor,)
    latents = pipe._unpack_latents(value, height, width, *factor)
    return latents[:, :, 0] if latents.dim() == 5 else latents  # a video of one frame


@pytest.mark.parametrize("family", FAMILIES)
def test_prediction_is_the_stock_pipelines_own(family, tmp_path_factory, monkeypatch):
    base = load_base(str(tiny_folder(family, tmp_path_factory)))
    arguments = {**WITHOUT_GUIDANCE.get(family, {"guidance_scale": 1.0})}
    arguments |= {"prompt": list(CAPTIONS), "height": HEIGHT, "width": WIDTH, "output_type": "latent"}
    steps = sampling_steps(base.pipe, monkeypatch, **arguments)
    with torch.no_grad():
        conditions = base.collate_conditions(
            [{name: value[0] for name, value in base.encode_captions([text]).items()} for text in CAPTIONS]
        )
    assert len(steps) == 2
    for step in steps:
        noisy = unpacked(base.pipe, step.sample, HEIGHT, WIDTH)
        output = unpacked(base.pipe, step.output, HEIGHT, WIDTH)
        # In float64, so that 1 - level, the time of Z-Image, is rounded no more than the pipeline's own.
        level = torch.full((len(CAPTIONS),), float(step.time) / 1000, dtype=torch.float64)
        if family == "pixart_sigma":  # a schedule of betas counts timesteps
            level = torch.full((len(CAPTIONS),), int(step.time))
            output = output[:, : noisy.shape[1]]
        with torch.no_grad():
            predicted = base.predict(base.denoiser, noisy, level, conditions)
        assert predicted.shape == noisy.shape
        assert (predicted - output).abs().max() < 1e-6 * output.abs().max()


@pytest.mark.parametrize("make_pipeline", [tiny_sd_pipeline, tiny_sdxl_pipeline])
def test_the_unet_families_follow_the_same_law(make_pipeline, tmp_path, monkeypatch):
    base = load_base(str(make_pipeline(tmp_path / "base", scheduler="ddim")))
    steps = sampling_steps(
        base.pipe,
        monkeypatch,
        prompt=list(CAPTIONS),
        height=32,
        width=48,
        guidance_scale=1.0,
        output_type="latent",
    )
    with torch.no_grad():
        conditions = base.encode_captions(CAPTIONS)
        if make_pipeline is tiny_sdxl_pipeline:
            conditions["time_ids"] = torch.tensor([[32.0, 48, 0, 0, 32, 48]]).expand(2, -1)
    assert len(steps) == 2
    for step in steps:
        timesteps = step.time.expand(len(CAPTIONS))
        with torch.no_grad():
            predicted = base.predict(base.denoiser, step.sample, timesteps, conditions)
        assert (predicted - step.output).abs().max() < 1e-6 * step.output.abs().max()


@pytest.mark.parametrize("make_pipeline", [class_pipeline, dit_pipeline])
def test_the_families_of_classes_follow_the_same_law(make_pipeline, tmp_path, monkeypatch):
    base = load_base(str(make_pipeline(tmp_path / "base")))
    steps = sampling_steps(base.pipe, monkeypatch, class_labels=[2, 0], guidance_scale=1.0)
    conditions = base.encode_captions([2, 0])
    assert len(steps) == 2
    for step in steps:
        timesteps = step.time.expand(2)
        with torch.no_grad():
            predicted = base.predict(base.denoiser, step.sample, timesteps, conditions)
        assert (predicted - step.output).abs().max() < 1e-6 * step.output.abs().max()
