"""The diffusion objective: noise a latent, let the model predict, compare with its target.

The training loss of Ho et al. 2020 (arXiv 2006.11239) for epsilon, v (Salimans & Ho 2022, arXiv 2202.00512)
and sample prediction; prior preservation of DreamBooth (Ruiz et al. 2022, arXiv 2208.12242).
"""

from collections.abc import Callable

from torch import Tensor, nn

from diffadapt.data.batches import Batch
from diffadapt.models.noise_schedule import NoiseSchedule


class Objective(nn.Module):
    """Holds the denoiser and its adapter and returns the loss: the one module accelerate wraps."""

    def __init__(
        self,
        denoiser: nn.Module,
        adapter: nn.Module,
        *,
        predict: Callable[..., Tensor],
        schedule: NoiseSchedule,
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

    def forward(self, batch: Batch) -> Tensor:
        """The scalar loss in float32."""
        noisy = self.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        predicted = self.predict(self.denoiser, noisy, batch.timesteps, batch.conditions)
        target = self.schedule.target(batch.latents, batch.noise, batch.timesteps)
        losses = (predicted.float() - target.float()).square().flatten(1).mean(dim=1)  # (B,)
        if self.snr_gamma is not None:
            losses = losses * self.schedule.loss_weight(batch.timesteps, self.snr_gamma)
        if self.prior_weight is None:
            return losses.mean()
        instance, prior = losses.chunk(2)
        return instance.mean() + self.prior_weight * prior.mean()
