"""The diffusion objective: noise a latent, let the model predict, compare with its target.

The training loss of Ho et al. 2020 (arXiv 2006.11239) for epsilon, v (Salimans & Ho 2022, arXiv 2202.00512)
and sample prediction; prior preservation of DreamBooth (Ruiz et al. 2022, arXiv 2208.12242).
"""

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffadapt.data.batches import Batch


class Objective(nn.Module):
    """Holds the denoiser and its adapter and returns the loss: the one module accelerate wraps."""

    def __init__(
        self,
        denoiser: nn.Module,
        adapter: nn.Module,
        *,
        predict: Callable[..., Tensor],
        schedule: DDPMScheduler,
        prior_weight: float | None = None,
        snr_gamma: float | None = None,
    ):
        super().__init__()
        self.denoiser = denoiser
        self.adapter = adapter
        self.predict = predict
        self.schedule = schedule
        self.prior_weight = prior_weight  # None: no class examples in the batch
        self.snr_gamma = snr_gamma  # None: every timestep counts alike
        target_of(
            schedule, *torch.zeros(2, 1, 1), torch.zeros(1, dtype=torch.int64)
        )  # unknown target: fail now

    def forward(self, batch: Batch) -> Tensor:
        """The scalar loss in float32."""
        noisy = self.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        predicted = self.predict(self.denoiser, noisy, batch.timesteps, batch.conditions)
        target = target_of(self.schedule, batch.latents, batch.noise, batch.timesteps)
        losses = (predicted.float() - target.float()).square().flatten(1).mean(dim=1)  # (B,)
        if self.snr_gamma is not None:
            losses = losses * min_snr_weight(self.schedule, batch.timesteps, self.snr_gamma)
        if self.prior_weight is None:
            return losses.mean()
        instance, prior = losses.chunk(2)
        return instance.mean() + self.prior_weight * prior.mean()


def target_of(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model is to predict."""
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise ValueError(
        f"unknown prediction type {kind!r} of the base's scheduler: epsilon, v_prediction or sample"
    )


def min_snr_weight(schedule: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """The Min-SNR-gamma weight of the loss (Hang et al. 2023, arXiv 2303.09556, section 3.4), (B,).

    It is min(SNR, gamma) for the loss of the clean sample, divided by SNR when the noise is predicted and by
    SNR + 1 for v. At a signal of exactly zero (a rescaled schedule) these are 1 and 0, and never NaN.
    """
    share = schedule.alphas_cumprod.to(timesteps.device)[timesteps].double()  # of the signal's variance
    snr = share / (1 - share)
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        weight = (gamma / snr).clamp(max=1.0)
    elif kind == "v_prediction":
        weight = snr.clamp(max=gamma) / (snr + 1)
    else:
        weight = snr.clamp(max=gamma)
    return weight.float()
