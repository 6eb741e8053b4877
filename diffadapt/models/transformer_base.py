"""What the bases with a diffusion transformer share: captions through the pipeline, sizes, sampling."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffadapt.adapters.architectures import Architecture, PublishedNames, transformer_architecture
from diffadapt.models import prompts
from diffadapt.models.base import BaseProfile
from diffadapt.models.caption_limits import CaptionLimit
from diffadapt.models.latent_diffusion import LatentDiffusionBase, decode_latents

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffadapt.models.sampling import ImageRequest, SamplingConfig

LANGUAGE_MODEL = "this base reads captions with a language model, which cannot be adapted; leave it out"
RESOLUTION = 1024  # pixels; transformers without a table of positions do not say what they were trained on


class TransformerBase(LatentDiffusionBase):
    """A base with a diffusion transformer, whose captions the pipeline's own `encode_prompt` encodes.

    Class attributes:
        transformer_class: class of the transformer.
        patch_size: positions of the latents per token, along one side.
        max_sequence_length: tokens of a caption that are read.
        caption_tokenizer: the tokenizer whose states the transformer reads word by word.
        negative_prompt_refusal: why the pipeline takes no negative prompt; None where it takes one.
    """

    transformer_class: ClassVar[str]
    samples_from_states = True
    patch_size: ClassVar[int] = 2
    max_sequence_length: ClassVar[int] = 512
    caption_tokenizer: ClassVar[str] = "tokenizer"
    negative_prompt_refusal: ClassVar[str | None] = None

    @abstractmethod
    def prompt_states(self, captions: list[str]) -> dict[str, Tensor]:
        """What the transformer reads of captions, each (B, ...), in the precision of the text encoder."""

    @classmethod
    @abstractmethod
    def published_names(cls, config: Mapping[str, Any]) -> PublishedNames:
        """Names by which files of other programs know a transformer of this configuration."""

    @classmethod
    def describe_architecture(
        cls, denoiser: nn.Module, components: Mapping[str, nn.Module]
    ) -> Architecture | None:
        if type(denoiser).__name__ != cls.transformer_class:
            return None
        layers = transformer_architecture(denoiser) or Architecture(cls.family, "transformer")
        return replace(layers, name=cls.family, published_names=cls.published_names(denoiser.config))

    # Images

    @property
    def resolution(self) -> int:
        return RESOLUTION

    @property
    def size_multiple(self) -> int:
        return self.sampling_size_multiple(self.pipe)

    @property
    def square_limits(self) -> tuple[int, int]:
        # Attention over one token has no gradient of queries and keys, so there are two a side.
        return self.size_multiple, 2 * self.size_multiple

    # Captions

    @property
    def empty_caption(self) -> str:
        return ""

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            # A list of its own, because some pipelines overwrite the one they are given.
            return self.prompt_states(list(captions))

    def caption_settings(self) -> dict[str, object]:
        return {"max_sequence_length": self.max_sequence_length}

    @classmethod
    def caption_limits(cls, pipe: DiffusionPipeline) -> list[CaptionLimit]:
        tokenizer = getattr(pipe, cls.caption_tokenizer)
        if tokenizer is None:
            return []
        return [CaptionLimit(tokenizer, cls.max_sequence_length - cls.template_length(pipe))]

    @classmethod
    def template_length(cls, pipe: DiffusionPipeline) -> int:
        """Tokens around a caption that count in `max_sequence_length`."""
        return getattr(pipe, cls.caption_tokenizer).num_special_tokens_to_add()

    def enable_text_encoder_training(self) -> None:
        raise ValueError(f"--train_text_encoder: {LANGUAGE_MODEL}")

    # Sampling

    @classmethod
    def sampling_size_multiple(cls, pipe: DiffusionPipeline) -> int:
        return pipe.vae_scale_factor * cls.patch_size

    @classmethod
    def guidance_arguments(cls, count: int, config: SamplingConfig) -> dict[str, object]:
        """How this pipeline is told guidance and a negative prompt, for `count` images.

        Raises:
            ValueError: there is a negative prompt, and the pipeline takes none.
        """
        if cls.negative_prompt_refusal is not None:
            if config.negative_prompt is not None:
                raise ValueError(f"--negative_prompt: {cls.negative_prompt_refusal}; leave it out")
            return {"guidance_scale": config.guidance_scale}
        negative_prompts = None
        if config.negative_prompt is not None:
            negative_prompts = [config.negative_prompt] * count
        return {"guidance_scale": config.guidance_scale, "negative_prompt": negative_prompts}

    @classmethod
    def pipeline_arguments(
        cls, requests: Sequence[ImageRequest], config: SamplingConfig
    ) -> dict[str, object]:
        arguments: dict[str, object] = {
            "prompt": [request.prompt for request in requests],
            "output_type": "latent",
            **cls.guidance_arguments(len(requests), config),
        }
        # Not every pipeline takes None for its own size.
        if config.height is not None:
            arguments["height"] = config.height
        if config.width is not None:
            arguments["width"] = config.width
        return arguments

    @classmethod
    def decode_output(cls, pipe: DiffusionPipeline, output: Tensor, config: SamplingConfig) -> Tensor:
        return decode_latents(pipe, output)


def transformer_profile(
    name: str,
    *,
    guidance_scale: float,
    num_inference_steps: int,
    inapplicable_options: Mapping[str, str],
    has_clip: bool = False,
) -> BaseProfile:
    """A profile with the values that the bases with transformers have in common.

    Args:
        name: of the family.
        guidance_scale, num_inference_steps: the defaults of its pipeline, or of its model card.
        inapplicable_options: training option -> why it cannot have an effect.
        has_clip: whether CLIP is among the text encoders, which can be trained.
    """
    if not has_clip:
        inapplicable_options = {**inapplicable_options, "train_text_encoder": LANGUAGE_MODEL}
    return BaseProfile(
        name=name,
        defaults={
            "targets": "attention",
            "train_batch_size": 1,
            "max_train_steps": 500,
            "lr_scheduler": "constant",
            "preferred_precision": "bf16",
            "center_crop": False,
            "num_validation_images": 4,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "sample_batch_size": 1,
            "extractor": None,
        },
        context_prompts=prompts.PHOTO_CONTEXTS,
        unrelated_prompts=prompts.PHOTO_THINGS,
        inapplicable_options=inapplicable_options,
    )
