"""Z-Image: states of Qwen3 without padding, lists in and out, time and velocity the other way round.

In the layout of ZImagePipeline (Z-Image team 2025, arXiv 2511.22699).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffadapt.adapters.architectures import PublishedNames
from diffadapt.formats.transformer_names import Z_IMAGE, original_layer
from diffadapt.models.chat_template import tokens_before_caption
from diffadapt.models.flow_matching import FlowMatchingBase, flow_profile
from diffadapt.models.latent_diffusion import to_denoiser
from diffadapt.models.masked_captions import MASK, STATES, MaskedCaptionsBase, without_padding

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TURBO_SHIFT = 3.0  # of Z-Image-Turbo's scheduler, which alone tells it from Z-Image, with a shift of 6


class ZImage(MaskedCaptionsBase, FlowMatchingBase):
    """A loaded base of this family."""

    family = "z_image"
    pipeline_classes = ("ZImagePipeline",)
    transformer_class = "ZImageTransformer2DModel"
    profile_of_family = flow_profile("z_image", guidance_scale=4.0, num_inference_steps=50)  # model card

    # It was trained on the most likely latents of an image, not on samples.
    is_stochastic = False

    @classmethod
    def published_names(cls, config: Mapping[str, Any]) -> PublishedNames:
        width = config["dim"]
        return PublishedNames(
            "Z-Image",
            "z_image",
            resolution=1024,
            has_published_sizes=width == 3840,
            original_layer=partial(original_layer, names=Z_IMAGE, width=width),
        )

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()  # (B, C, h, w)

    def sample_latents(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        return to_denoiser(self.pipe.vae, encoded)

    @property
    def undistilled_base(self) -> str | None:
        is_turbo = self.pipe.scheduler.config.shift == TURBO_SHIFT
        return "Tongyi-MAI/Z-Image" if is_turbo else None

    @property
    def token_shape(self) -> tuple[int, ...]:
        return (self.denoiser.config.cap_feat_dim,)

    def caption_states(self, caption: str) -> Tensor:
        """(length, 2560)"""
        rows, _ = self.pipe.encode_prompt(
            [caption], do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return rows[0]

    @classmethod
    def embedding_arguments(
        cls, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, object]:
        return {
            "prompt_embeds": without_padding(positive[STATES], positive[MASK]),
            "negative_prompt_embeds": without_padding(negative[STATES], negative[MASK]),
        }

    @classmethod
    def template_length(cls, pipe: DiffusionPipeline) -> int:
        return tokens_before_caption(pipe.tokenizer)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        dtype = denoiser.dtype
        states = without_padding(conditions[STATES].to(dtype), conditions[MASK])
        images = list(noisy.to(dtype).unsqueeze(2))  # (C, 1, h, w) each: videos of one frame
        # The transformer's time is 0 for noise and 1 for images, so its velocity has the other sign.
        outputs = denoiser(images, 1 - timesteps, states, return_dict=False)[0]
        return -torch.stack(list(outputs)).squeeze(2)
