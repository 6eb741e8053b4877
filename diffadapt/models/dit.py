"""Class-conditional diffusion transformers (Peebles and Xie 2022, arXiv 2212.09748) in DiTPipeline's layout.

The loss is the paper's simple one, on the predicted noise. Its variance term, which trains the other half of
the output alone, is left out: the samplers of diffusers that are used with DiT do not read that half.
"""

from __future__ import annotations

from torch import Tensor, nn

from diffadapt.models.class_conditioned import ClassConditionedBase

DEFAULTS = {
    "dit": {
        "targets": "attention",
        "train_batch_size": 8,
        "max_train_steps": 2000,
        "lr_scheduler": "constant",
        "preferred_precision": "bf16",
        "center_crop": False,
        "num_validation_images": 16,
        "num_inference_steps": 50,
        "guidance_scale": 4.0,
        "sample_batch_size": 4,
        "extractor": None,
    },
}
TUNED = {"dit": {}}


class DiT(ClassConditionedBase):
    """A loaded base of this family. Every block holds a copy of the class table; trained, they are one."""

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def resolution(self) -> int:
        """The side of the pictures the base was made for, in pixels."""
        factor = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        return self.denoiser.config.sample_size * factor

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The predicted noise (B, C, h, w); of a model that learns its variance too, the first half."""
        labels = conditions["class_labels"]
        made = denoiser(noisy.to(denoiser.dtype), timesteps, class_labels=labels, return_dict=False)[0]
        return made[:, : noisy.shape[1]]
