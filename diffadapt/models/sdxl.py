"""Stable Diffusion XL: two text encoders, and a denoiser that is told sizes and crops.

Podell et al. 2023 (arXiv 2307.01952), sections 2.1 and 2.2; in the layout of StableDiffusionXLPipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diffadapt.models.text_conditioned import EMPTY, IDS, TextConditionedBase

if TYPE_CHECKING:
    from diffadapt.common.images import CropGeometry

DEFAULTS = {
    "sdxl": {
        "targets": "attention",
        "train_batch_size": 1,
        "max_train_steps": 500,
        "lr_scheduler": "constant",
        "preferred_precision": "bf16",
        "center_crop": False,
        "num_validation_images": 4,
        "num_inference_steps": 30,
        "guidance_scale": 5.0,
        "sample_batch_size": 1,
        "extractor": None,
    },
}
TUNED = {"sdxl": {}}


class StableDiffusionXL(TextConditionedBase):
    """A loaded base of this family."""

    @property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        return [self.pipe.tokenizer, self.pipe.tokenizer_2]

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids of both encoders; ``is_empty`` (B,) marks captions without words."""
        return {**super().tokens(captions), EMPTY: torch.tensor([caption == "" for caption in captions])}

    def text_states(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, length, sum of widths), the second-last states of both encoders, and
        ``text_embeds`` (B, width), the second one's pooled text.

        An empty caption is zeros where the pipeline makes it so when it draws without a negative prompt.
        """
        states, pooled = [], None
        for encoder, name in ((self.pipe.text_encoder, IDS), (self.pipe.text_encoder_2, f"{IDS}_2")):
            found = encoder(tokens[name].to(encoder.device), output_hidden_states=True)
            pooled = found[0]
            states.append(found.hidden_states[-2])
        made = {"encoder_hidden_states": torch.cat(states, dim=-1), "text_embeds": pooled}
        if self.pipe.config.force_zeros_for_empty_prompt:
            empty = tokens[EMPTY].to(pooled.device)
            made = {k: v.masked_fill(empty.view(-1, *(1,) * (v.dim() - 1)), 0.0) for k, v in made.items()}
        return made

    def size_conditions(self, views: Sequence[CropGeometry]) -> dict[str, Tensor]:
        """``time_ids`` (B, 6): each picture's height and width as it was, top and left of the cut, and the
        height and width it has now, in pixels."""
        rows = [(*view.original_size, *view.crop, *view.size) for view in views]
        return {"time_ids": torch.tensor(rows, dtype=torch.float32)}

    def ask(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, told: dict[str, Tensor]) -> Tensor:
        dtype = denoiser.dtype
        added = {"text_embeds": told["text_embeds"].to(dtype), "time_ids": told["time_ids"]}
        states = told["encoder_hidden_states"].to(dtype)
        return denoiser(noisy.to(dtype), timesteps, states, added_cond_kwargs=added, return_dict=False)[0]
