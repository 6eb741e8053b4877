"""The diffusion objective: noise a latent, let the model predict, compare with its target.

The training loss of Ho et al. 2020 (arXiv 2006.11239) for epsilon, v (Salimans & Ho 2022, arXiv 2202.00512)
and sample prediction; prior preservation of DreamBooth (Ruiz et al. 2022, arXiv 2208.12242).
"""

from collections.abc import Callable

from torch import Tensor, nn

from diffadapt.data.batches import Batch
from diffadapt.models.noise_schedule import NoiseSchedule


class Objective(nn.Module):
    """Holds the denoiser and its adapter and returns the loss: the one module accelerate wraps.

    Args:
        predict: calls the denoiser: (denoiser, noisy latents, timesteps, conditions) to a prediction.
        schedule: adds noise and gives the target of a prediction.
        prior_weight: weight of the class images, the second half of each batch; None: there are none.
        snr_gamma: gamma of the Min-SNR weight; None: every timestep counts alike.
    """

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
        self.prior_weight = prior_weight
        self.snr_gamma = snr_gamma

    def forward(self, batch: Batch) -> Tensor:
        """The scalar loss in float32."""
        noisy = self.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)  # (B, C, h, w)
        predicted = self.predict(self.denoiser, noisy, batch.timesteps, batch.conditions)  # (B, C, h, w)
        target = self.schedule.target(batch.latents, batch.noise, batch.timesteps)  # (B, C, h, w)
        # loss_b = w(t_b) * mean over channels and pixels of (prediction - target)^2
        losses = (predicted.float() - target.float()).square().flatten(1).mean(dim=1)  # (B,)
        if self.snr_gamma is not None:
            losses = losses * self.schedule.loss_weight(batch.timesteps, self.snr_gamma)
        if self.prior_weight is None:
            return losses.mean()
        # DreamBooth, equation 2: the subject's loss + prior_weight * the class images' loss
        instance_losses, prior_losses = losses.chunk(2)
        return instance_losses.mean() + self.prior_weight * prior_losses.mean()
