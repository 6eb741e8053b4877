"""Class-conditional UNet2DModel in pixel space: no autoencoder, classes instead of captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from diffadapt.models.base import BaseProfile
from diffadapt.models.class_conditioned import ClassConditionedBase

if TYPE_CHECKING:
    from diffadapt.pipelines import ClassConditionalPipeline

DIGITS = BaseProfile(
    name="digits",
    defaults={
        "targets": "attention+conv",
        "train_batch_size": 32,
        "max_train_steps": 200,
        "lr_scheduler": "cosine",
        "preferred_precision": "no",
        "center_crop": True,
        "num_validation_images": 200,
        "num_inference_steps": 15,
        "guidance_scale": 2.0,
        "sample_batch_size": 100,
        "extractor": "embedded:digits",
    },
    tuned_methods={
        "superlora": {"learning_rate": 1e-2},
        "lora": {"learning_rate": 3e-3},
    },
)
UNET_2D = BaseProfile(
    name="unet2d",
    defaults={
        "targets": "attention",
        "train_batch_size": 32,
        "max_train_steps": 2000,
        "lr_scheduler": "constant",
        "preferred_precision": "no",
        "center_crop": True,
        "num_validation_images": 40,
        "num_inference_steps": 50,
        "guidance_scale": 1.0,
        "sample_batch_size": 16,
        "extractor": None,
    },
)


class UNet2D(ClassConditionedBase):
    """A loaded base of this family, in ClassConditionalPipeline's layout. Its latents are the pixels."""

    family = "unet2d"
    pipeline_classes = ("ClassConditionalPipeline",)
    profile_of_family = UNET_2D
    embedded_profiles: ClassVar = {"digits": DIGITS}
    is_stochastic = False

    @classmethod
    def pipeline_type(cls, class_name: str) -> type[ClassConditionalPipeline]:
        from diffadapt.pipelines import ClassConditionalPipeline

        return ClassConditionalPipeline  # diffusers has none

    @property
    def resolution(self) -> int:
        return self.denoiser.config.sample_size

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], unchanged."""
        return pixels.to(self.denoiser.device, torch.float32)

    def sample_latents(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        return encoded

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        labels = conditions["class_labels"]
        return denoiser(noisy.to(denoiser.dtype), timesteps, class_labels=labels, return_dict=False)[0]
