"""FLUX.2: three hidden layers of a language model side by side, latents in normalised 2 x 2 patches.

klein in the layout of Flux2KleinPipeline, with Qwen3 and guidance by a second prediction; dev in that of
Flux2Pipeline, with Mistral Small and embedded guidance. Their images are given as patches already, so a
position is a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffadapt.adapters.architectures import Architecture, PublishedNames
from diffadapt.formats.transformer_names import FLUX2, original_layer
from diffadapt.models.caption_limits import CaptionLimit
from diffadapt.models.chat_template import tokens_before_caption
from diffadapt.models.flow_matching import TRAINING_GUIDANCE, FlowMatchingBase, flow_profile
from diffadapt.models.sampling_size import image_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffadapt.models.sampling import SamplingConfig


class Flux2Base(FlowMatchingBase):
    """What klein and dev share.

    Class attributes:
        has_embedded_guidance: whether the transformer is told a guidance scale.
    """

    has_embedded_guidance: ClassVar[bool]
    transformer_class = "Flux2Transformer2DModel"
    negative_prompt_refusal = "FLUX.2 is guided away from an empty prompt or not at all"
    patch_size = 1

    # The pipeline encodes images to their most likely latents.
    is_stochastic = False

    @classmethod
    def describe_architecture(
        cls, denoiser: nn.Module, components: Mapping[str, nn.Module]
    ) -> Architecture | None:
        architecture = super().describe_architecture(denoiser, components)
        if architecture is None or denoiser.config.guidance_embeds != cls.has_embedded_guidance:
            return None
        return architecture

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Patches (B, 4C, h/2, w/2) of the autoencoder's latents (B, C, h, w)."""
        vae = self.pipe.vae
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return self.pipe._patchify_latents(latents).float()

    def sample_latents(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        # (x - mean) / sqrt(var + eps)
        mean, deviation = patch_statistics(self.pipe.vae, encoded)
        return (encoded - mean) / deviation

    def longest_conditions(self) -> dict[str, tuple[int, ...]]:
        width = self.denoiser.config.joint_attention_dim
        return {"encoder_hidden_states": (self.max_sequence_length, width)}

    def prompt_states(self, captions: list[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, 512, 3 * width); padding is not masked, as the base was trained."""
        states, _ = self.pipe.encode_prompt(captions, max_sequence_length=self.max_sequence_length)
        return {"encoder_hidden_states": states}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        dtype = denoiser.dtype
        states = conditions["encoder_hidden_states"].to(dtype)  # (B, L, D)
        guidance = None
        if self.has_embedded_guidance:
            guidance = torch.full_like(timesteps, TRAINING_GUIDANCE)  # (B,)
        output = denoiser(
            self.pipe._pack_latents(noisy.to(dtype)),  # (B, N, C)
            encoder_hidden_states=states,
            timestep=timesteps,
            img_ids=self.pipe._prepare_latent_ids(noisy).to(noisy.device),  # (B, N, 4)
            txt_ids=self.pipe._prepare_text_ids(states).to(noisy.device),  # (B, L, 4)
            guidance=guidance,
            return_dict=False,
        )[0]  # (B, N, C)
        return output.permute(0, 2, 1).reshape(noisy.shape)

    @classmethod
    def sampling_size_multiple(cls, pipe: DiffusionPipeline) -> int:
        return 2 * pipe.vae_scale_factor  # a patch of the autoencoder's latents is one position

    @classmethod
    def decode_output(cls, pipe: DiffusionPipeline, output: Tensor, config: SamplingConfig) -> Tensor:
        # Latents at the autoencoder's scale and size, as klein's pipeline returns them.
        pixels = pipe.vae.decode(output.to(pipe.vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()


class Flux2Klein(Flux2Base):
    """A loaded klein, 4B or 9B."""

    family = "flux2_klein"
    pipeline_classes = ("Flux2KleinPipeline",)
    profile_of_family = flow_profile("flux2_klein", guidance_scale=4.0, num_inference_steps=50)  # of base
    has_embedded_guidance = False

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

    @property
    def undistilled_base(self) -> str | None:
        return "black-forest-labs/FLUX.2-klein-base-4B or -9B" if self.pipe.config.is_distilled else None

    @classmethod
    def template_length(cls, pipe: DiffusionPipeline) -> int:
        return tokens_before_caption(pipe.tokenizer)

    @classmethod
    def embedding_arguments(
        cls, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, object]:
        return {
            "prompt_embeds": positive["encoder_hidden_states"],
            "negative_prompt_embeds": negative["encoder_hidden_states"],
        }


class Flux2Dev(Flux2Base):
    """A loaded dev, 32B."""

    family = "flux2_dev"
    pipeline_classes = ("Flux2Pipeline",)
    # Guidance and steps are those of the pipeline.
    profile_of_family = flow_profile("flux2_dev", guidance_scale=4.0, num_inference_steps=50)
    has_embedded_guidance = True

    @classmethod
    def published_names(cls, config: Mapping[str, Any]) -> PublishedNames:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return PublishedNames(
            "Flux.2-dev",
            "flux_2_dev",
            resolution=1024,
            has_published_sizes=width == 6144,
            original_layer=partial(original_layer, names=FLUX2, width=width),
        )

    @classmethod
    def caption_limits(cls, pipe: DiffusionPipeline) -> list[CaptionLimit]:
        # The component is a processor of texts and images, with its tokenizer inside.
        surrounding = tokens_before_caption(pipe.tokenizer, system_message=pipe.system_message)
        return [CaptionLimit(pipe.tokenizer.tokenizer, cls.max_sequence_length - surrounding)]

    @classmethod
    def negative_caption(cls, config: SamplingConfig) -> str | None:
        return None

    @classmethod
    def embedding_arguments(
        cls, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, object]:
        return {"prompt_embeds": positive["encoder_hidden_states"]}

    @classmethod
    def decode_output(cls, pipe: DiffusionPipeline, output: Tensor, config: SamplingConfig) -> Tensor:
        height, width = image_size(pipe, config)
        multiple = cls.sampling_size_multiple(pipe)
        patches = output.permute(0, 2, 1)  # (B, 4C, N), from tokens (B, N, 4C)
        patches = patches.reshape(len(output), -1, height // multiple, width // multiple)
        mean, deviation = patch_statistics(pipe.vae, patches)
        latents = pipe._unpatchify_latents(patches * deviation + mean)  # (B, C, h, w)
        return super().decode_output(pipe, latents, config)


def patch_statistics(vae: nn.Module, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, (1, 4C, 1, 1): the autoencoder ends in a batch normalisation."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    variance = vae.bn.running_var.view(1, -1, 1, 1)
    deviation = torch.sqrt(variance + vae.config.batch_norm_eps)
    return mean.to(patches), deviation.to(patches)
