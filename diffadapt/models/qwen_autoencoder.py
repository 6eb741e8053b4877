"""Bases with the autoencoder of Qwen-Image: one of videos, given videos of one frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffadapt.models.latent_diffusion import to_autoencoder
from diffadapt.models.transformer_base import TransformerBase

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class QwenAutoencoderBase(TransformerBase):
    """The part of the contract that concerns images; latents are (B, C, h, w), without the axis of frames."""

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        video = pixels.to(vae.device, vae.dtype).unsqueeze(2)  # (B, 3, 1, H, W)
        parameters = vae.encode(video).latent_dist.parameters  # (B, 2C, 1, h, w)
        return parameters.squeeze(2).float()


def decode_video_latents(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W), float32 in [0, 1], of latents (B, C, h, w) at the denoiser's scale."""
    vae = pipe.vae
    latents = to_autoencoder(vae, latents.to(vae.dtype))
    video = vae.decode(latents.unsqueeze(2), return_dict=False)[0]  # (B, 3, 1, H, W)
    return (video.squeeze(2).float() / 2 + 0.5).clamp(0, 1).cpu()
