"""Class-conditional diffusion transformers (Peebles and Xie 2022, arXiv 2212.09748) in DiTPipeline's layout.

The loss is the paper's simple one, on the predicted noise. Its variance term, which trains the other half of
the output alone, is left out: the samplers of diffusers that are used with DiT do not read that half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from diffadapt.models.base import BaseProfile
from diffadapt.models.class_conditioned import ClassConditionedBase
from diffadapt.models.latent_diffusion import LatentDiffusionBase

if TYPE_CHECKING:
    from diffadapt.pipelines import DiTPipeline

DIFFUSION_TRANSFORMER = BaseProfile(
    name="dit",
    defaults={
        "targets": "attention",
        "train_batch_size": 8,
        "max_train_steps": 2000,
        "lr_scheduler": "constant",
        "preferred_precision": "bf16",
        "center_crop": False,
        "num_validation_images": 16,
        "num_inference_steps": 50,
        "guidance_scale": 4.0,  # default of DiTPipeline
        "sample_batch_size": 4,
        "extractor": None,
    },
)


class DiT(ClassConditionedBase, LatentDiffusionBase):
    """A loaded base of this family. Every block holds a copy of the class table; trained, they are one."""

    family = "dit"
    pipeline_classes = ("DiTPipeline",)
    profile_of_family = DIFFUSION_TRANSFORMER

    @classmethod
    def pipeline_type(cls, class_name: str) -> type[DiTPipeline]:
        from diffadapt.pipelines import DiTPipeline

        return DiTPipeline  # diffusers' own knows one size of class table

    @property
    def resolution(self) -> int:
        levels = len(self.pipe.vae.config.block_out_channels)
        return self.denoiser.config.sample_size * 2 ** (levels - 1)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The predicted noise (B, C, h, w); of a model that learns its variance too, the first half."""
        labels = conditions["class_labels"]
        output = denoiser(noisy.to(denoiser.dtype), timesteps, class_labels=labels, return_dict=False)[0]
        channels = noisy.shape[1]
        return output[:, :channels]  # of (B, C, h, w) or (B, 2 C, h, w)
