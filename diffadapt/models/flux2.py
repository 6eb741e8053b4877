"""FLUX.2 klein: three hidden layers of Qwen3 side by side, latents in normalised 2 x 2 patches.

In the layout of Flux2KleinPipeline. Its images are given as patches already, so a position is a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffadapt.adapters.architectures import PublishedNames
from diffadapt.formats.transformer_names import FLUX2, original_layer
from diffadapt.models.chat_template import tokens_before_caption
from diffadapt.models.flow_matching import FlowMatchingBase, flow_profile

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffadapt.models.sampling import SamplingConfig


class Flux2Klein(FlowMatchingBase):
    """A loaded base of this family."""

    family = "flux2_klein"
    pipeline_classes = ("Flux2KleinPipeline",)
    transformer_class = "Flux2Transformer2DModel"
    profile_of_family = flow_profile("flux2_klein", guidance_scale=4.0, num_inference_steps=50)  # of base
    patch_size = 1

    # The pipeline encodes images to their most likely latents.
    is_stochastic = False

    @classmethod
    def published_names(cls, config: Mapping[str, Any]) -> PublishedNames:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        size = "9b" if width > 3072 else "4b"
        return PublishedNames(
            f"Flux.2-klein-{size}",
            f"flux_2_klein_{size}",
            resolution=1024,
            has_published_sizes=width in (3072, 4096),
            original_layer=partial(original_layer, names=FLUX2, width=width),
        )

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Patches (B, 4C, h/2, w/2) of the autoencoder's latents (B, C, h, w)."""
        vae = self.pipe.vae
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return self.pipe._patchify_latents(latents).float()

    def sample_latents(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        # The autoencoder ends in a batch normalisation without parameters: (x - mean) / sqrt(var + eps)
        vae = self.pipe.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(encoded)
        variance = vae.bn.running_var.view(1, -1, 1, 1).to(encoded)
        return (encoded - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)

    @property
    def undistilled_base(self) -> str | None:
        return "black-forest-labs/FLUX.2-klein-base-4B or -9B" if self.pipe.config.is_distilled else None

    def longest_conditions(self) -> dict[str, tuple[int, ...]]:
        width = self.denoiser.config.joint_attention_dim
        return {"encoder_hidden_states": (self.max_sequence_length, width)}

    def prompt_states(self, captions: list[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, 512, 3 * width); padding is not masked, as the base was trained."""
        states, _ = self.pipe.encode_prompt(captions, max_sequence_length=self.max_sequence_length)
        return {"encoder_hidden_states": states}

    @classmethod
    def template_length(cls, pipe: DiffusionPipeline) -> int:
        return tokens_before_caption(pipe.tokenizer)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        dtype = denoiser.dtype
        states = conditions["encoder_hidden_states"].to(dtype)  # (B, L, D)
        output = denoiser(
            self.pipe._pack_latents(noisy.to(dtype)),  # (B, N, C)
            encoder_hidden_states=states,
            timestep=timesteps,
            img_ids=self.pipe._prepare_latent_ids(noisy).to(noisy.device),  # (B, N, 4)
            txt_ids=self.pipe._prepare_text_ids(states).to(noisy.device),  # (B, L, 4)
            guidance=None,
            return_dict=False,
        )[0]  # (B, N, C)
        return output.permute(0, 2, 1).reshape(noisy.shape)

    @classmethod
    def sampling_size_multiple(cls, pipe: DiffusionPipeline) -> int:
        return 2 * pipe.vae_scale_factor  # a patch of the autoencoder's latents is one position

    @classmethod
    def guidance_arguments(cls, count: int, config: SamplingConfig) -> dict[str, object]:
        if config.negative_prompt is not None:
            raise ValueError(
                "--negative_prompt: FLUX.2 klein always guides away from an empty prompt; leave it out"
            )
        return {"guidance_scale": config.guidance_scale}

    @classmethod
    def embedding_arguments(
        cls, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, object]:
        return {
            "prompt_embeds": positive["encoder_hidden_states"],
            "negative_prompt_embeds": negative["encoder_hidden_states"],
        }

    @classmethod
    def decode_output(cls, pipe: DiffusionPipeline, output: Tensor, config: SamplingConfig) -> Tensor:
        # The pipeline's latents are at the autoencoder's scale and size already.
        pixels = pipe.vae.decode(output.to(pipe.vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()
