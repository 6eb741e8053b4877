"""Stable Diffusion XL: two text encoders, and a denoiser that is conditioned on sizes and crops.

Podell et al. 2023 (arXiv 2307.01952), sections 2.1 and 2.2; in the layout of StableDiffusionXLPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffadapt.adapters.architectures import Architecture, PublishedNames
from diffadapt.formats.sgm_names import sgm_path
from diffadapt.models import prompts
from diffadapt.models.base import BaseProfile
from diffadapt.models.text_conditioned import EMPTY, IDS, TextConditionedBase

if TYPE_CHECKING:
    from diffadapt.common.images import CropGeometry

STABLE_DIFFUSION_XL = BaseProfile(
    name="sdxl",
    defaults={
        "targets": "attention",
        "train_batch_size": 1,
        "max_train_steps": 500,
        "lr_scheduler": "constant",
        "preferred_precision": "bf16",
        "center_crop": False,
        "num_validation_images": 4,
        "num_inference_steps": 30,
        "guidance_scale": 5.0,  # default of StableDiffusionXLPipeline
        "sample_batch_size": 1,
        "extractor": None,
    },
    context_prompts=prompts.PHOTO_CONTEXTS,
    unrelated_prompts=prompts.PHOTO_THINGS,
)


class StableDiffusionXL(TextConditionedBase):
    """A loaded base of this family."""

    family = "sdxl"
    pipeline_classes = ("StableDiffusionXLPipeline",)
    profile_of_family = STABLE_DIFFUSION_XL

    @classmethod
    def describe_architecture(
        cls, denoiser: nn.Module, components: Mapping[str, nn.Module]
    ) -> Architecture | None:
        if type(denoiser).__name__ != "UNet2DConditionModel":
            return None
        config = denoiser.config
        if config.addition_embed_type != "text_time":
            return None
        # In up blocks with attention the upsampling convolution is the third layer of the original code.
        attended = frozenset(i for i, kind in enumerate(config.up_block_types) if "Attn" in kind)
        return Architecture(
            "sdxl",
            "unet",
            unread_layers=_unread_layers(components),
            published_names=PublishedNames(
                "stable-diffusion-xl-v1-base",
                "sdxl_base_v1-0",
                resolution=1024,
                has_published_sizes=config.cross_attention_dim == 2048,
                original_path=partial(sgm_path, resnets=config.layers_per_block, attended=attended),
                numbers_first_encoder=True,
            ),
        )

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids of both encoders; `is_empty` (B,) marks captions without words."""
        is_empty = torch.tensor([caption == "" for caption in captions])
        return {**super().tokens(captions), EMPTY: is_empty}

    def text_states(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """The second-last states of both encoders side by side, and the pooled text of the second one.

        An empty caption is zeros where the pipeline makes it so when it samples without a negative prompt.

        Returns:
            `encoder_hidden_states` (B, length, sum of widths) and `text_embeds` (B, width).
        """
        first, second = self.pipe.text_encoder, self.pipe.text_encoder_2
        output = first(tokens[IDS].to(first.device), output_hidden_states=True)
        output_2 = second(tokens[f"{IDS}_2"].to(second.device), output_hidden_states=True)
        states = [output.hidden_states[-2], output_2.hidden_states[-2]]
        states = torch.cat(states, dim=-1)  # (B, length, sum of widths)
        pooled = output_2[0]  # (B, width of the second)
        if self.pipe.config.force_zeros_for_empty_prompt:
            empty = tokens[EMPTY].to(pooled.device)
            states = states.masked_fill(empty.view(-1, 1, 1), 0.0)
            pooled = pooled.masked_fill(empty.view(-1, 1), 0.0)
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    def size_conditions(self, crops: Sequence[CropGeometry]) -> dict[str, Tensor]:
        """`time_ids` (B, 6), in pixels: height and width of each original image, top and left of the crop,
        height and width of the crop."""
        rows = [(*crop.original_size, *crop.crop, *crop.size) for crop in crops]
        return {"time_ids": torch.tensor(rows, dtype=torch.float32)}

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        dtype = denoiser.dtype
        states = conditions["encoder_hidden_states"].to(dtype)
        added = {"text_embeds": conditions["text_embeds"].to(dtype), "time_ids": conditions["time_ids"]}
        return denoiser(noisy.to(dtype), timesteps, states, added_cond_kwargs=added, return_dict=False)[0]


def _unread_layers(components: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """The first text encoder's states are read before its last layer, so nothing behind gets a gradient."""
    if not {"text_encoder", "text_encoder_2"} <= components.keys():
        return {}
    last = components["text_encoder"].config.num_hidden_layers - 1
    return {"text_encoder": (f"*layers.{last}.*", "final_layer_norm")}
