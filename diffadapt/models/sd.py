"""The Stable Diffusion 1.x/2.x family: one CLIP text encoder, a UNet.

Works for every pipeline stored in StableDiffusionPipeline's layout, with AutoencoderKL or AutoencoderTiny.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from diffadapt.adapters.architectures import Architecture, PublishedNames
from diffadapt.models import prompts
from diffadapt.models.base import BaseProfile
from diffadapt.models.text_conditioned import IDS, MASK, TextConditionedBase

# The embedded base is small, so its convolutions are adapted too.
EMOJI = BaseProfile(
    name="emoji",
    defaults={
        "targets": "attention+conv",
        "train_batch_size": 8,
        "max_train_steps": 300,
        "lr_scheduler": "cosine",
        "preferred_precision": "bf16",
        "center_crop": True,
        "num_validation_images": 16,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "sample_batch_size": 20,
        "extractor": "embedded:clip",
    },
    tuned_methods={
        "lora": {"rank": 8, "learning_rate": 5e-4},
        "flora": {"rank": 14, "learning_rate": 5e-4},
    },
    context_prompts=prompts.EMOJI_CONTEXTS,
    unrelated_prompts=prompts.EMOJI_THINGS,
)
STABLE_DIFFUSION = BaseProfile(
    name="sd",
    defaults={
        "targets": "attention",
        "train_batch_size": 4,
        "max_train_steps": 500,
        "lr_scheduler": "constant",
        "preferred_precision": "no",
        "center_crop": False,
        "num_validation_images": 4,
        "num_inference_steps": 25,
        "guidance_scale": 7.5,  # default of StableDiffusionPipeline
        "sample_batch_size": 4,
        "extractor": None,
    },
    context_prompts=prompts.PHOTO_CONTEXTS,
    unrelated_prompts=prompts.PHOTO_THINGS,
)


class StableDiffusion(TextConditionedBase):
    """A loaded base of this family."""

    family = "sd"
    pipeline_classes = ("StableDiffusionPipeline",)
    profile_of_family = STABLE_DIFFUSION
    embedded_profiles: ClassVar = {"emoji": EMOJI}
    without_safety_checker: ClassVar = {"safety_checker": None, "requires_safety_checker": False}

    @classmethod
    def describe_architecture(
        cls, denoiser: nn.Module, components: Mapping[str, nn.Module]
    ) -> Architecture | None:
        if type(denoiser).__name__ != "UNet2DConditionModel":
            return None
        if denoiser.config.addition_embed_type == "text_time":
            return None  # SDXL
        width = denoiser.config.cross_attention_dim
        if width == 1024:
            names = PublishedNames("stable-diffusion-v2-512", "sd_v2", resolution=512)
            return Architecture("sd2", "unet", published_names=names)
        names = PublishedNames(
            "stable-diffusion-v1", "sd_v1", resolution=512, has_published_sizes=width == 768
        )
        return Architecture("sd1", "unet", published_names=names)

    def text_states(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, length, width): the text encoder's last, normalised states."""
        encoder = self.pipe.text_encoder
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            mask = tokens[MASK].to(encoder.device)
        output = encoder(tokens[IDS].to(encoder.device), attention_mask=mask)
        return {"encoder_hidden_states": output[0]}  # (B, length, width)

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        dtype = denoiser.dtype
        conditions = {name: value.to(dtype) for name, value in conditions.items()}
        return denoiser(noisy.to(dtype), timesteps, return_dict=False, **conditions)[0]
