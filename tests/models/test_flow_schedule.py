import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import stats

from diffadapt.models.flow_schedule import (
    FlowSchedule,
    ResolutionShift,
    density_quantiles,
    flow_schedule,
)
from diffadapt.models.noise_schedule import DENSITIES, TimestepSampling, parse_timestep_shift

LATENTS = torch.zeros(1, 16, 64, 64)
UNIFORMS = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


def keys(count, purpose="timestep"):
    return [(purpose, 0, "instance", 0, sample) for sample in range(count)]


def test_the_logit_normal_density_is_scipys():
    quantiles = density_quantiles(UNIFORMS, "logit_normal")
    assert quantiles.numpy() == pytest.approx(
        1 / (1 + math.e ** -stats.norm.ppf(UNIFORMS.numpy())), rel=1e-12
    )


def test_the_mode_density_is_diffusers_own(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: UNIFORMS)
    expected = compute_density_for_timestep_sampling("mode", len(UNIFORMS), mode_scale=1.29)
    assert torch.equal(density_quantiles(UNIFORMS, "mode"), expected)


def test_the_uniform_density_changes_nothing():
    assert torch.equal(density_quantiles(UNIFORMS, "uniform"), UNIFORMS)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shift", [0.3, 1.0, 6.0])
def test_levels_stay_between_latents_and_noise(density, shift, monkeypatch):
    extremes = iter([0.0, 1 - 2**-53])
    monkeypatch.setattr("diffadapt.models.flow_schedule.uniform", lambda key, count: [next(extremes)])
    levels = FlowSchedule(density, shift).sample_timesteps(keys(2), LATENTS)
    assert levels.dtype == torch.float32
    assert (levels > 0).all()
    assert (levels < 1).all()


def test_levels_depend_on_their_key_alone():
    schedule = FlowSchedule()
    together = schedule.sample_timesteps(keys(5), LATENTS)
    alone = [schedule.sample_timesteps([key], LATENTS) for key in keys(5)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_follow_the_shifted_logit_normal(shift):
    levels = FlowSchedule(shift=shift).sample_timesteps(keys(4000), LATENTS).double()
    unshifted = levels / (shift - (shift - 1) * levels)  # the inverse of s -> k s / (1 + (k - 1) s)
    assert stats.kstest(torch.logit(unshifted).numpy(), "norm").pvalue > 0.01


def test_a_static_shift_is_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = flow_schedule(scheduler.config, TimestepSampling(density="uniform"), patch_size=2)
    # Its table holds the shifted levels of 1, 0.999 ... 0.001.
    levels = torch.arange(1000, 0, -1) / 1000
    assert torch.allclose(
        schedule.shift * levels / (1 + (schedule.shift - 1) * levels), scheduler.sigmas[:1000]
    )


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (128, 96)])
def test_a_dynamic_shift_is_the_pipelines_own(height, width):
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9
    )
    schedule = flow_schedule(scheduler.config, TimestepSampling(), patch_size=2)
    mu = calculate_shift(height // 2 * (width // 2), 256, 8192, 0.5, 0.9)
    assert schedule.shift.at(torch.zeros(1, 16, height, width)) == pytest.approx(math.exp(mu), rel=1e-12)


def test_a_larger_image_is_trained_at_more_noise():
    schedule = FlowSchedule(shift=ResolutionShift())
    small = schedule.sample_timesteps(keys(8), torch.zeros(1, 16, 32, 32))
    large = schedule.sample_timesteps(keys(8), torch.zeros(1, 16, 128, 128))
    assert (large > small).all()


def test_an_explicit_shift_replaces_the_bases_own():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert flow_schedule(scheduler.config, TimestepSampling(shift=2.5), patch_size=2).shift == 2.5


def test_the_mix_and_the_target_are_those_of_diffusers_in_float32():
    scheduler = FlowMatchEulerDiscreteScheduler()
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = scheduler.sigmas[[100, 500, 900]]
    schedule = FlowSchedule()
    expected = scheduler.scale_noise(latents, scheduler.timesteps[[100, 500, 900]], noise)
    assert torch.allclose(schedule.add_noise(latents, noise, levels), expected, atol=1e-6)
    assert schedule.add_noise(latents.bfloat16(), noise.bfloat16(), levels).dtype == torch.float32
    # One Euler step to level 0 along the target leads back to the latents.
    noisy = schedule.add_noise(latents, noise, levels)
    reached = noisy - levels.view(-1, 1, 1, 1) * schedule.target(latents, noise, levels)
    assert torch.allclose(reached, latents, atol=1e-5)


def test_a_scheduler_of_betas_is_refused():
    with pytest.raises(ValueError, match="no scheduler of flow matching"):
        flow_schedule(DDIMScheduler().config, TimestepSampling(), patch_size=2)


def test_an_unknown_density_is_named():
    with pytest.raises(ValueError, match="cosine: choose from logit_normal, uniform, mode"):
        density_quantiles(UNIFORMS, "cosine")


def test_there_are_no_snr_weights():
    with pytest.raises(ValueError, match=r"--snr_gamma 5\.0: flow matching"):
        FlowSchedule().loss_weight(torch.ones(1), 5.0)


@pytest.mark.parametrize(("text", "shift"), [(None, None), ("auto", None), ("3", 3.0), ("0.5", 0.5)])
def test_the_shift_is_auto_or_a_number(text, shift):
    assert parse_timestep_shift(text) == shift


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "automatic"])
def test_other_shifts_are_refused(text):
    with pytest.raises(ValueError, match="auto or a number above 0"):
        parse_timestep_shift(text)
