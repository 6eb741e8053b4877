"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, a joint transformer.

Esser et al. 2024 (arXiv 2403.03206); in the layout of StableDiffusion3Pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.adapters.architectures import PublishedNames
from diffadapt.formats.transformer_names import SD3, original_layer
from diffadapt.models.base import BaseModel
from diffadapt.models.caption_limits import CaptionLimit, tokenizer_limit
from diffadapt.models.clip_with_t5 import ClipWithT5Base
from diffadapt.models.flow_matching import flow_profile

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TIME_SCALE = 1000  # the transformer counts noise levels in thousandths


class StableDiffusion3(ClipWithT5Base):
    """A loaded base of this family."""

    family = "sd3"
    pipeline_classes = ("StableDiffusion3Pipeline",)
    transformer_class = "SD3Transformer2DModel"
    # Model cards of SD 3.5: 28 steps (large), a guidance scale of 4.5 (medium).
    profile_of_family = flow_profile("sd3", guidance_scale=4.5, num_inference_steps=28, has_clip=True)
    # T5 is the largest part of SD3 and can be left out; the pipeline puts zeros in place of its states.
    optional_components = BaseModel.optional_components | {"text_encoder_3", "tokenizer_3"}
    left_out_where_absent = ("text_encoder_3", "tokenizer_3")
    clip_encoders: ClassVar = ("text_encoder", "text_encoder_2")
    clip_tokenizers: ClassVar = ("tokenizer", "tokenizer_2")
    caption_tokenizer = "tokenizer_3"
    max_sequence_length = 256  # the pipeline's default: with fewer, images lose quality

    @classmethod
    def published_names(cls, config: Mapping[str, Any]) -> PublishedNames:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        version = "3" if config["qk_norm"] is None else "3.5"
        size = "large" if width > 1536 else "medium"
        last_block = config["num_layers"] - 1
        swapped = ("norm_out.linear", f"transformer_blocks.{last_block}.norm1_context.linear")
        return PublishedNames(
            f"stable-diffusion-v{version}-{size}",  # as ComfyUI names checkpoints
            "sd3",
            resolution=1024,
            has_published_sizes=width in (1536, 2432),
            original_layer=partial(original_layer, names=SD3, width=width, swapped=swapped),
        )

    @property
    def resolution(self) -> int:
        return self.denoiser.config.sample_size * self.pipe.vae_scale_factor

    def longest_conditions(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        length = self.pipe.tokenizer_max_length + self.max_sequence_length
        return {
            "encoder_hidden_states": (length, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }

    def prompt_states(self, captions: list[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, 77 + 256, 4096): CLIP's, then T5's; `pooled_projections` (B, 2048)."""
        states, _, pooled, _ = self.pipe.encode_prompt(
            captions,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    @classmethod
    def caption_limits(cls, pipe: DiffusionPipeline) -> list[CaptionLimit]:
        # T5 reads more than CLIP does; without it the limit is CLIP's.
        return super().caption_limits(pipe) or [tokenizer_limit(pipe.tokenizer)]

    def t5_states(self, captions: list[str]) -> Tensor:
        states = self.prompt_states(captions)["encoder_hidden_states"]
        return states[:, self.pipe.tokenizer_max_length :]  # behind those of CLIP

    def states_with_clip(self, token_ids: Sequence[Tensor], t5_states: Tensor) -> dict[str, Tensor]:
        clip_states = []
        clip_pooled = []
        for name, ids in zip(self.clip_encoders, token_ids, strict=True):
            encoder = getattr(self.pipe, name)
            output = encoder(ids.to(encoder.device), output_hidden_states=True)
            clip_states.append(output.hidden_states[-2])
            clip_pooled.append(output[0])
        states = torch.cat(clip_states, dim=-1)  # (B, 77, 768 + 1280)
        states = F.pad(states, (0, t5_states.shape[-1] - states.shape[-1]))  # (B, 77, 4096)
        states = torch.cat([states, t5_states.to(states)], dim=1)  # (B, 77 + 256, 4096)
        return {"encoder_hidden_states": states, "pooled_projections": torch.cat(clip_pooled, dim=-1)}

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, levels: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        dtype = denoiser.dtype
        states = conditions["encoder_hidden_states"].to(dtype)
        pooled = conditions["pooled_projections"].to(dtype)
        return denoiser(
            noisy.to(dtype),
            timestep=levels * TIME_SCALE,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    @classmethod
    def embedding_arguments(
        cls, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, object]:
        return {
            "prompt_embeds": positive["encoder_hidden_states"],
            "pooled_prompt_embeds": positive["pooled_projections"],
            "negative_prompt_embeds": negative["encoder_hidden_states"],
            "negative_pooled_prompt_embeds": negative["pooled_projections"],
        }
