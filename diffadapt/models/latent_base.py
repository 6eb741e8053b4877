"""What all bases share that work in the latents of an autoencoder (AutoencoderKL or AutoencoderTiny)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderTiny, DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffadapt.common.images import CropGeometry


@dataclass
class LatentBase:
    """A loaded base: its pipeline, where it came from and which defaults fit it."""

    pipe: DiffusionPipeline
    source: str  # as named by the user: a folder, a hub name, a file or embedded:NAME
    family: str  # key of DEFAULTS

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet

    @property
    def resolution(self) -> int:
        """The side of the pictures the base was made for, in pixels."""
        return self.denoiser.config.sample_size * self.pipe.vae_scale_factor

    def training_schedule(self) -> DDPMScheduler:
        """The noise schedule the base was trained with, whatever sampler it is shipped with.

        Raises: ValueError for a sampler that has no discrete schedule of a thousand steps behind it.
        """
        config = self.pipe.scheduler.config
        if "beta_schedule" not in config:
            raise ValueError(
                f"{self.source} is made for {type(self.pipe.scheduler).__name__}, which has no schedule of "
                "betas; bases trained with continuous noise levels or flow matching are not supported"
            )
        return DDPMScheduler.from_config(config)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> what is cached: (B, 2C, h, w) mean and log-variance, or (B, C, h, w)."""
        vae = self.pipe.vae
        pixels = pixels.to(vae.device, vae.dtype)
        if isinstance(vae, AutoencoderTiny):
            return vae.encode(pixels).latents.float()
        return vae.encode(pixels).latent_dist.parameters.float()

    @property
    def is_stochastic(self) -> bool:
        """Whether encoding gives a distribution to sample from."""
        return not isinstance(self.pipe.vae, AutoencoderTiny)

    def sample_latents(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        """Latents at the denoiser's scale from `encode_images`; `noise` draws from the posterior."""
        if noise is None:
            return to_denoiser(self.pipe.vae, encoded)
        mean, log_variance = encoded.chunk(2, dim=1)
        spread = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))  # bounds of DiagonalGaussianDistribution
        return to_denoiser(self.pipe.vae, mean + spread * noise)

    def size_conditions(self, views: Sequence["CropGeometry"]) -> dict[str, Tensor]:
        """What the denoiser is told about sizes and crops: nothing, unless a family says otherwise."""
        return {}

    def truncated_captions(self, captions: Sequence[str | int]) -> list:
        """Captions that are longer than the base reads: none, unless it is told words."""
        return []


def to_denoiser(vae: nn.Module, latents: Tensor) -> Tensor:
    """The autoencoder's latents (B, C, h, w) at the scale the denoiser works in."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) * vae.config.scaling_factor / std


def to_autoencoder(vae: nn.Module, latents: Tensor) -> Tensor:
    """The inverse of `to_denoiser`."""
    mean, std = _statistics(vae, latents)
    return latents * std / vae.config.scaling_factor + mean


def _statistics(vae: nn.Module, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Per-channel mean and deviation, which few autoencoders have in their configuration; else 0 and 1."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return vae.config.get("shift_factor") or 0.0, 1.0
    return tuple(torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
