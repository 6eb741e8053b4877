"""Bases that work in the latents of an autoencoder, AutoencoderKL or AutoencoderTiny."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffadapt.models.base import BaseModel

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class LatentDiffusionBase(BaseModel):
    """The part of the contract that concerns images, through the pipeline's autoencoder."""

    @property
    def resolution(self) -> int:
        return self.denoiser.config.sample_size * self.pipe.vae_scale_factor

    @property
    def is_stochastic(self) -> bool:
        return type(self.pipe.vae).__name__ != "AutoencoderTiny"

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        output = vae.encode(pixels.to(vae.device, vae.dtype))
        if self.is_stochastic:
            return output.latent_dist.parameters.float()  # (B, 2C, h, w): mean and log-variance
        return output.latents.float()  # (B, C, h, w)

    def sample_latents(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return to_denoiser(self.pipe.vae, encoded)
        mean, log_variance = encoded.chunk(2, dim=1)  # (B, C, h, w) each
        # The bounds are those of diffusers' DiagonalGaussianDistribution.
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return to_denoiser(self.pipe.vae, mean + deviation * noise)


def to_denoiser(vae: nn.Module, latents: Tensor) -> Tensor:
    """The autoencoder's latents (B, C, h, w) at the scale the denoiser works in."""
    mean, deviation = _latent_statistics(vae, latents)
    return (latents - mean) * _scaling_factor(vae) / deviation


def to_autoencoder(vae: nn.Module, latents: Tensor) -> Tensor:
    """The inverse of `to_denoiser`."""
    mean, deviation = _latent_statistics(vae, latents)
    return latents * deviation / _scaling_factor(vae) + mean


def decode_latents(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W), float32 in [0, 1], of latents at the denoiser's scale.

    The autoencoder decodes in its own precision; in float32 where fp16 would overflow.
    """
    vae = pipe.vae
    dtype = vae.dtype
    overflows = dtype == torch.float16 and vae.config.get("force_upcast", False)
    if overflows:
        vae.to(torch.float32)
    pixels = vae.decode(to_autoencoder(vae, latents.to(vae.dtype)), return_dict=False)[0]
    if overflows:
        vae.to(dtype)
    return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()


def _scaling_factor(vae: nn.Module) -> float:
    return vae.config.get("scaling_factor") or 1.0  # some have statistics of each channel in its place


def _latent_statistics(vae: nn.Module, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation of each channel, (1, C, 1, 1), as few autoencoders have them; else shift and 1."""
    mean = vae.config.get("latents_mean")
    deviation = vae.config.get("latents_std")
    if mean is None or deviation is None:
        return vae.config.get("shift_factor") or 0.0, 1.0
    mean = torch.tensor(mean).view(1, -1, 1, 1).to(latents)
    deviation = torch.tensor(deviation).view(1, -1, 1, 1).to(latents)
    return mean, deviation
