"""Qwen-Image: states of Qwen2.5-VL with a mask, a joint transformer, packed latents.

In the layout of QwenImagePipeline (Qwen team 2025, arXiv 2508.02324).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffadapt.adapters.architectures import PublishedNames
from diffadapt.formats.transformer_names import same_layer
from diffadapt.models.chat_template import token_count
from diffadapt.models.flow_matching import FlowMatchingBase, flow_profile
from diffadapt.models.masked_captions import MASK, STATES, MaskedCaptionsBase, mask_or_none
from diffadapt.models.qwen_autoencoder import QwenAutoencoderBase, decode_video_latents
from diffadapt.models.sampling_size import image_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffadapt.models.sampling import SamplingConfig

EMPTY_CAPTION = " "  # an empty string has no text states


class QwenImage(QwenAutoencoderBase, MaskedCaptionsBase, FlowMatchingBase):
    """A loaded base of this family."""

    family = "qwen_image"
    pipeline_classes = ("QwenImagePipeline",)
    transformer_class = "QwenImageTransformer2DModel"
    mask_argument = "prompt_embeds_mask"
    profile_of_family = flow_profile("qwen_image", guidance_scale=4.0, num_inference_steps=50)  # model card

    @classmethod
    def published_names(cls, config: Mapping[str, Any]) -> PublishedNames:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return PublishedNames(
            "Qwen-Image",
            "qwen_image",
            resolution=1328,
            has_published_sizes=width == 3072,
            original_layer=same_layer,
        )

    @property
    def empty_caption(self) -> str:
        return EMPTY_CAPTION

    @property
    def token_shape(self) -> tuple[int, ...]:
        return (self.denoiser.config.joint_attention_dim,)

    def caption_states(self, caption: str) -> Tensor:
        """(length, 3584)"""
        states, _ = self.pipe.encode_prompt([caption], max_sequence_length=self.max_sequence_length)
        return states[0]

    @classmethod
    def template_length(cls, pipe: DiffusionPipeline) -> int:
        # The states of the template before the caption are cut off, if it has the length it is known by.
        before, _ = pipe.prompt_template_encode.split("{}")
        return token_count(pipe.tokenizer, before) - pipe.prompt_template_encode_start_idx

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        pipeline = type(self.pipe)
        dtype = denoiser.dtype
        batch_size, channels, height, width = noisy.shape
        packed = pipeline._pack_latents(noisy.to(dtype), batch_size, channels, height, width)  # (B, N, 4C)
        output = denoiser(
            packed,
            timestep=timesteps,
            encoder_hidden_states=conditions[STATES].to(dtype),
            encoder_hidden_states_mask=mask_or_none(conditions[MASK]),
            img_shapes=[[(1, height // 2, width // 2)]] * batch_size,  # frames, rows and columns of tokens
            return_dict=False,
        )[0]  # (B, N, 4C)
        factor = self.pipe.vae_scale_factor
        latents = pipeline._unpack_latents(output, height * factor, width * factor, factor)
        return latents.squeeze(2)

    @classmethod
    def negative_caption(cls, config: SamplingConfig) -> str | None:
        # Without a negative prompt the pipeline would sample without guidance.
        return EMPTY_CAPTION if config.negative_prompt is None else config.negative_prompt

    @classmethod
    def guidance_arguments(cls, count: int, config: SamplingConfig) -> dict[str, object]:
        negative_prompts = [cls.negative_caption(config)] * count
        return {"true_cfg_scale": config.guidance_scale, "negative_prompt": negative_prompts}

    @classmethod
    def decode_output(cls, pipe: DiffusionPipeline, output: Tensor, config: SamplingConfig) -> Tensor:
        height, width = image_size(pipe, config)
        latents = pipe._unpack_latents(output, height, width, pipe.vae_scale_factor)  # (B, C, 1, h, w)
        return decode_video_latents(pipe, latents.squeeze(2))
