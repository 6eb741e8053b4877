"""Weights of the loss against diffusers' own signal-to-noise ratio and against the formula."""

import pytest
import torch
from diffusers.training_utils import compute_snr
from helpers.small_run import SmallBatches, predict, small_train_state

from diffadapt.models.beta_schedule import BetaSchedule
from diffadapt.training.loop import train

TIMESTEPS = torch.arange(0, 1000, 37)


@pytest.mark.parametrize(("kind", "shift"), [("epsilon", 0), ("v_prediction", 1)])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_diffusers_training_scripts(kind, shift, gamma):
    schedule = BetaSchedule(prediction_type=kind, beta_schedule="scaled_linear")
    snr = compute_snr(schedule, TIMESTEPS)
    expected = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / (snr + shift)
    assert torch.allclose(schedule.loss_weight(TIMESTEPS, gamma), expected, rtol=1e-4, atol=1e-7)


def test_the_weight_of_a_predicted_sample_is_the_clamped_ratio():
    schedule = BetaSchedule(prediction_type="sample")
    expected = compute_snr(schedule, TIMESTEPS).clamp(max=5)
    assert torch.allclose(schedule.loss_weight(TIMESTEPS, 5.0), expected, rtol=1e-4)


@pytest.mark.parametrize(("kind", "last"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)])
def test_no_signal_at_the_last_timestep_gives_the_limit_and_no_nan(kind, last):
    schedule = BetaSchedule(prediction_type=kind, rescale_betas_zero_snr=True)
    assert schedule.alphas_cumprod[-1] == 0
    weights = schedule.loss_weight(torch.tensor([998, 999]), 5.0)
    assert weights.isfinite().all()
    assert weights[1] == last


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_weighted_mean(kind):
    train_state = small_train_state(objective={"prediction_type": kind}, snr_gamma=0.5, max_train_steps=1)
    objective, batch = train_state.objective, SmallBatches().batch(range(2))
    noisy = objective.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        predicted = predict(objective.denoiser, noisy, batch.timesteps, batch.conditions)
    target = objective.schedule.target(batch.latents, batch.noise, batch.timesteps)
    squares = (predicted - target).double().square().mean(dim=(1, 2, 3))
    weights = objective.schedule.loss_weight(batch.timesteps, 0.5).double()
    (step,) = train(train_state, SmallBatches())
    assert step.loss == pytest.approx(float((weights * squares).mean()), rel=1e-5)
    assert step.loss != pytest.approx(float(squares.mean()), rel=1e-3)


def test_training_at_a_zero_terminal_ratio_is_finite():
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    train_state = small_train_state(objective=settings, snr_gamma=5.0, max_train_steps=2)

    class Last(SmallBatches):
        def batch(self, positions):
            batch = super().batch(positions)
            batch.timesteps[:] = torch.tensor([999, 500])
            return batch

    assert all(step.loss > 0 and step.grad_norm > 0 for step in train(train_state, Last()))
