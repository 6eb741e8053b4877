"""Chroma: a kin of FLUX.1 without CLIP and without embedded guidance, with a mask on T5's states.

In the layout of ChromaPipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.adapters.architectures import PublishedNames
from diffadapt.formats.transformer_names import CHROMA, original_layer
from diffadapt.models.flow_matching import flow_profile
from diffadapt.models.flux_tokens import FluxTokensBase
from diffadapt.models.masked_captions import MASK, STATES, masked_embedding_arguments


class Chroma(FluxTokensBase):
    """A loaded base of this family."""

    family = "chroma"
    pipeline_classes = ("ChromaPipeline",)
    transformer_class = "ChromaTransformer2DModel"
    profile_of_family = flow_profile("chroma", guidance_scale=5.0, num_inference_steps=35)  # of the pipeline

    @classmethod
    def published_names(cls, config: Mapping[str, Any]) -> PublishedNames:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return PublishedNames(
            "chroma",
            "chroma",
            resolution=1024,
            has_published_sizes=width == 3072,
            original_layer=partial(original_layer, names=CHROMA, width=width),
        )

    def longest_conditions(self) -> dict[str, tuple[int, ...]]:
        length = self.max_sequence_length
        return {STATES: (length, self.denoiser.config.joint_attention_dim), MASK: (length,)}

    def prompt_states(self, captions: list[str]) -> dict[str, Tensor]:
        """T5's states (B, 512, 4096), and which of them are not padding (B, 512), as numbers."""
        states, _, mask, _, _, _ = self.pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {STATES: states, MASK: mask}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        dtype = denoiser.dtype
        latents = noisy.to(dtype)
        tokens = self.pack(latents)  # (B, N, 4C)
        states = conditions[STATES].to(dtype)  # (B, L, D)
        # The pipeline's mask is made of numbers, which attention adds to its logits: padding counts less by
        # a factor of e, it is not left out. It is kept so, because images are sampled so.
        mask = conditions[MASK].to(dtype)  # (B, L)
        image_mask = mask.new_ones(tokens.shape[:2])  # (B, N)
        attention_mask = torch.cat([mask, image_mask], dim=1)  # (B, L + N)
        pass_mask_to_checkpoints(self.denoiser, attention_mask)
        output = denoiser(
            tokens,
            timestep=timesteps,
            encoder_hidden_states=states,
            attention_mask=attention_mask,
            return_dict=False,
            **self.position_ids(latents, states.shape[1]),
        )[0]  # (B, N, 4C)
        return self.unpack(output, noisy.shape)

    @classmethod
    def embedding_arguments(
        cls, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, object]:
        return masked_embedding_arguments("prompt_attention_mask", positive, negative)


@dataclass(frozen=True)
class _CheckpointWithMask:
    """Gradient checkpointing that gives single blocks the mask, as the forward without it does.

    ChromaTransformer2DModel of diffusers 0.42 leaves it out where it checkpoints them: the model that is
    trained would be another one than that which samples.
    """

    checkpoint: Callable[..., Tensor]
    single_blocks: nn.ModuleList
    mask: Tensor  # (B, L + N)

    def __call__(self, block: nn.Module, *args: object) -> Tensor:
        lacks_mask = len(args) == 3  # hidden states, modulation, rotary embedding
        if lacks_mask and block in list(self.single_blocks):
            args = (*args, self.mask)
        return self.checkpoint(block, *args)


def pass_mask_to_checkpoints(denoiser: nn.Module, mask: Tensor) -> None:
    """Before a forward of the transformer: its checkpoints know the mask (B, L + N) of this forward."""
    checkpoint = denoiser._gradient_checkpointing_func
    if checkpoint is None:
        return
    if isinstance(checkpoint, _CheckpointWithMask):
        checkpoint = checkpoint.checkpoint
    denoiser._gradient_checkpointing_func = _CheckpointWithMask(
        checkpoint, denoiser.single_transformer_blocks, mask
    )
