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
    ):
        super().__init__()
        self.denoiser = denoiser
        self.adapter = adapter
        self.predict = predict
        self.schedule = schedule
        self.prior_weight = prior_weight  # None: no class examples in the batch
        target_of(
            schedule, *torch.zeros(2, 1, 1), torch.zeros(1, dtype=torch.int64)
        )  # unknown target: fail now

    def forward(self, batch: Batch) -> Tensor:
        """The scalar loss in float32."""
        noisy = self.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        predicted = self.predict(self.denoiser, noisy, batch.timesteps, batch.conditions)
        target = target_of(self.schedule, batch.latents, batch.noise, batch.timesteps)
        losses = (predicted.float() - target.float()).square().flatten(1).mean(dim=1)  # (B,)
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
