"""Class-conditional UNet2DModel in pixel space: no autoencoder, classes instead of words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffadapt.models.class_conditioned import ClassConditionedBase

# Values for options that were not given. What was tuned on the embedded base never reaches another base.
DEFAULTS = {
    "digits": {
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
    "unet2d": {
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
}
# Ranks and learning rates that were tried on a base; other methods bring their own.
TUNED = {
    "digits": {
        "superlora": {"learning_rate": 1e-2},
        "lora": {"learning_rate": 3e-3},
    },
    "unet2d": {},
}


class UNet2D(ClassConditionedBase):
    """A loaded base of this family, in ClassConditionalPipeline's layout. Its latents are the pixels."""

    is_stochastic = False

    @property
    def resolution(self) -> int:
        """The side of its pictures in pixels."""
        return self.denoiser.config.sample_size

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], unchanged."""
        return pixels.to(self.denoiser.device, torch.float32)

    def sample_latents(self, encoded: Tensor, noise: Tensor | None) -> Tensor:
        return encoded

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The denoiser's output (B, 3, H, W)."""
        labels = conditions["class_labels"]
        return denoiser(noisy.to(denoiser.dtype), timesteps, class_labels=labels, return_dict=False)[0]
