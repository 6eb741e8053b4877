"""FLUX.1 (dev, schnell and their kin): CLIP's pooled text, T5's states, packed latents.

In the layout of FluxPipeline, which packs 2 x 2 latents into a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffadapt.adapters.architectures import PublishedNames
from diffadapt.formats.transformer_names import FLUX, original_layer
from diffadapt.models.clip_with_t5 import ClipWithT5Base
from diffadapt.models.flow_matching import TRAINING_GUIDANCE, flow_profile
from diffadapt.models.flux_tokens import FluxTokensBase

if TYPE_CHECKING:
    from diffadapt.models.sampling import SamplingConfig


class Flux(FluxTokensBase, ClipWithT5Base):
    """A loaded base of this family."""

    family = "flux"
    pipeline_classes = ("FluxPipeline",)
    transformer_class = "FluxTransformer2DModel"
    # Guidance and steps are those of the pipeline.
    profile_of_family = flow_profile("flux", guidance_scale=3.5, num_inference_steps=28, has_clip=True)
    clip_encoders: ClassVar = ("text_encoder",)
    clip_tokenizers: ClassVar = ("tokenizer",)
    caption_tokenizer = "tokenizer_2"
    negative_prompt_refusal = "FLUX.1 is sampled without a second, negative prediction"

    @property
    def undistilled_base(self) -> str | None:
        # schnell is the one without embedded guidance that samples without a shift.
        is_schnell = not (
            self.denoiser.config.guidance_embeds or self.pipe.scheduler.config.use_dynamic_shifting
        )
        return "black-forest-labs/FLUX.1-dev" if is_schnell else None

    @classmethod
    def published_names(cls, config: Mapping[str, Any]) -> PublishedNames:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return PublishedNames(
            "flux-1-dev" if config["guidance_embeds"] else "flux-1-schnell",
            "flux1",
            resolution=1024,
            has_published_sizes=width == 3072,
            original_layer=partial(original_layer, names=FLUX, width=width),
        )

    def longest_conditions(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        return {
            "encoder_hidden_states": (self.max_sequence_length, config.joint_attention_dim),
            "pooled_projections": (config.pooled_projection_dim,),
        }

    def prompt_states(self, captions: list[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (B, 512, 4096) of T5, `pooled_projections` (B, 768) of CLIP."""
        states, pooled, _ = self.pipe.encode_prompt(
            captions, None, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def t5_states(self, captions: list[str]) -> Tensor:
        return self.prompt_states(captions)["encoder_hidden_states"]

    def states_with_clip(self, token_ids: Sequence[Tensor], t5_states: Tensor) -> dict[str, Tensor]:
        encoder = self.pipe.text_encoder
        pooled = encoder(token_ids[0].to(encoder.device)).pooler_output  # (B, 768)
        return {"encoder_hidden_states": t5_states, "pooled_projections": pooled}

    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, levels: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        dtype = denoiser.dtype
        latents = noisy.to(dtype)
        tokens = self.pack(latents)  # (B, N, 4C)
        states = conditions["encoder_hidden_states"].to(dtype)  # (B, L, D)
        guidance = None
        if denoiser.config.guidance_embeds:
            guidance = torch.full_like(levels, TRAINING_GUIDANCE)  # (B,)
        output = denoiser(
            tokens,
            timestep=levels,
            guidance=guidance,
            pooled_projections=conditions["pooled_projections"].to(dtype),
            encoder_hidden_states=states,
            return_dict=False,
            **self.position_ids(latents, states.shape[1]),
        )[0]  # (B, N, 4C)
        return self.unpack(output, noisy.shape)

    @classmethod
    def negative_caption(cls, config: SamplingConfig) -> str | None:
        return None

    @classmethod
    def embedding_arguments(
        cls, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, object]:
        return {
            "prompt_embeds": positive["encoder_hidden_states"],
            "pooled_prompt_embeds": positive["pooled_projections"],
        }
