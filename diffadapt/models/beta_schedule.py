"""Discrete noise schedules of betas, as of DDPM: epsilon, v or sample prediction.

Ho et al. 2020 (arXiv 2006.11239); v prediction: Salimans and Ho 2022 (arXiv 2202.00512).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor

from diffadapt.common.keyed_random import Key, integer

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class BetaSchedule(DDPMScheduler):
    """diffusers' DDPM schedule as a `NoiseSchedule`."""

    def sample_timesteps(self, keys: Sequence[Key], latents: Tensor) -> Tensor:
        """Uniform over the schedule's steps, (B,) int64."""
        limit = self.config.num_train_timesteps
        return torch.tensor([integer(key, limit) for key in keys])

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise, the velocity or the latents themselves, by the prediction type."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "v_prediction":
            return self.get_velocity(latents, noise, timesteps)
        return latents

    def loss_weight(self, timesteps: Tensor, snr_gamma: float) -> Tensor:
        """The Min-SNR-gamma weight of the loss (Hang et al. 2023, arXiv 2303.09556, section 3.4), (B,).

        It is min(SNR, gamma) for the loss of the clean sample, divided by SNR when the noise is predicted and
        by SNR + 1 for v. At a signal of exactly zero (a rescaled schedule) these are 1 and 0, and never NaN.
        """
        # SNR = alpha_bar / (1 - alpha_bar)
        signal = self.alphas_cumprod.to(timesteps.device)[timesteps].double()
        snr = signal / (1 - signal)
        if self.config.prediction_type == "epsilon":
            weight = (snr_gamma / snr).clamp(max=1.0)  # min(SNR, gamma) / SNR
        elif self.config.prediction_type == "v_prediction":
            weight = snr.clamp(max=snr_gamma) / (snr + 1)
        else:
            weight = snr.clamp(max=snr_gamma)
        return weight.float()


def beta_schedule(scheduler: SchedulerMixin, source: str) -> BetaSchedule:
    """The training schedule behind a sampler.

    Args:
        source: of the base, for messages.

    Raises:
        ValueError: the sampler has no betas, or an unknown prediction type.
    """
    config = scheduler.config
    if "beta_schedule" not in config:
        raise ValueError(
            f"{source} is made for {type(scheduler).__name__}, which has no schedule of betas; bases trained "
            "with continuous noise levels or flow matching are not supported"
        )
    schedule = BetaSchedule.from_config(config)
    prediction_type = schedule.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"unknown prediction type {prediction_type!r} of the base's scheduler: epsilon, v_prediction or "
            "sample"
        )
    return schedule
