"""Latents as the transformers of FLUX.1 and its kin read them: 2 x 2 positions packed into a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffadapt.models.flow_matching import FlowMatchingBase
from diffadapt.models.latent_diffusion import decode_latents
from diffadapt.models.sampling_size import image_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffadapt.models.sampling import SamplingConfig


class FluxTokensBase(FlowMatchingBase):
    """A base whose pipeline packs latents as FluxPipeline does."""

    def pack(self, latents: Tensor) -> Tensor:
        """Tokens (B, N, 4C) of latents (B, C, h, w), N = h/2 w/2."""
        return type(self.pipe)._pack_latents(latents, *latents.shape)

    def unpack(self, tokens: Tensor, shape: Sequence[int]) -> Tensor:
        """Latents of the shape (B, C, h, w) of tokens (B, N, 4C)."""
        factor = self.pipe.vae_scale_factor
        height, width = shape[-2:]
        return type(self.pipe)._unpack_latents(tokens, height * factor, width * factor, factor)

    def position_ids(self, latents: Tensor, text_length: int) -> dict[str, Tensor]:
        """Positions of both streams: `img_ids` (N, 3), with row and column; `txt_ids` (L, 3), all zero."""
        batch_size, _, height, width = latents.shape
        image_ids = type(self.pipe)._prepare_latent_image_ids(
            batch_size, height // 2, width // 2, latents.device, latents.dtype
        )
        text_ids = torch.zeros(text_length, 3, device=latents.device, dtype=latents.dtype)
        return {"img_ids": image_ids, "txt_ids": text_ids}

    @classmethod
    def decode_output(cls, pipe: DiffusionPipeline, output: Tensor, config: SamplingConfig) -> Tensor:
        height, width = image_size(pipe, config)
        latents = pipe._unpack_latents(output, height, width, pipe.vae_scale_factor)  # (B, C, h, w)
        return decode_latents(pipe, latents)
