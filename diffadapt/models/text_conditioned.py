"""Bases conditioned on captions by CLIP text encoders: token ids and text states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffadapt.common.pipeline_components import tokenizer_names
from diffadapt.models.caption_limits import CaptionLimit, tokenizer_limit
from diffadapt.models.latent_diffusion import LatentDiffusionBase, decode_latents

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffadapt.models.sampling import ImageRequest, SamplingConfig

# Names of token ids among the conditions; the second encoder's end in _2, and so on.
IDS = "input_ids"
MASK = "attention_mask"
EMPTY = "is_empty"


class TextConditionedBase(LatentDiffusionBase):
    """A base conditioned on captions.

    Its text encoders run once for every caption; or, when they are trained, in every step: then a caption is
    kept as its token ids.
    """

    @property
    def empty_caption(self) -> str:
        return ""

    @abstractmethod
    def text_states(self, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        """The text encoders' states of token ids, each (B, ...), named as `denoise` takes them."""

    @abstractmethod
    def denoise(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The denoiser's output (B, C, h, w) at its own precision, from text states and size conditions."""

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Text states in the text encoders' precision, or token ids when these are trained; each (B, ...)."""
        tokens = self.tokens(captions)
        if self.train_text_encoder:
            return tokens
        with torch.no_grad():
            return self.text_states(tokens)

    def enable_text_encoder_training(self) -> None:
        self.train_text_encoder = True

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        # Token ids are encoded here, so that gradients reach the text encoders.
        ready = {name: value for name, value in conditions.items() if not name.startswith((IDS, MASK, EMPTY))}
        if IDS in conditions:
            ready |= self.text_states(conditions)
        return self.denoise(denoiser, noisy, timesteps, ready)

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and attention masks (B, length) of each text encoder."""
        tokens = {}
        for number, tokenizer in enumerate(self.tokenizers.values(), 1):
            suffix = "" if number == 1 else f"_{number}"
            output = tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            tokens[IDS + suffix] = output.input_ids  # (B, length)
            tokens[MASK + suffix] = output.attention_mask  # (B, length), 1 for a token, 0 for padding
        return tokens

    @classmethod
    def caption_limits(cls, pipe: DiffusionPipeline) -> list[CaptionLimit]:
        limits = []
        for name in tokenizer_names(pipe):
            tokenizer = getattr(pipe, name)
            if tokenizer is not None:
                limits.append(tokenizer_limit(tokenizer))
        return limits

    @classmethod
    def pipeline_arguments(
        cls, requests: Sequence[ImageRequest], config: SamplingConfig
    ) -> dict[str, object]:
        negative_prompts = None
        if config.negative_prompt is not None:
            negative_prompts = [config.negative_prompt] * len(requests)
        return {
            "prompt": [request.prompt for request in requests],
            "negative_prompt": negative_prompts,
            "guidance_scale": config.guidance_scale,
            "height": config.height,
            "width": config.width,
            # Latents are decoded by `decode_output`, in the autoencoder's own precision.
            "output_type": "latent",
        }

    @classmethod
    def decode_output(cls, pipe: DiffusionPipeline, output: Tensor, config: SamplingConfig) -> Tensor:
        return decode_latents(pipe, output)
