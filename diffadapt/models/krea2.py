"""Krea 2: several hidden layers of Qwen3-VL with a mask, a single-stream transformer, packed latents.

In the layout of Krea2Pipeline, with the autoencoder of Qwen-Image.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffadapt.adapters.architectures import PublishedNames
from diffadapt.formats.transformer_names import KREA2, original_layer
from diffadapt.models.chat_template import token_count
from diffadapt.models.flow_matching import FlowMatchingBase, flow_profile
from diffadapt.models.masked_captions import MASK, STATES, MaskedCaptionsBase, mask_or_none
from diffadapt.models.qwen_autoencoder import QwenAutoencoderBase, decode_video_latents
from diffadapt.models.transformer_base import RESOLUTION

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffadapt.models.sampling import SamplingConfig


class Krea2(QwenAutoencoderBase, MaskedCaptionsBase, FlowMatchingBase):
    """A loaded base of this family."""

    family = "krea2"
    pipeline_classes = ("Krea2Pipeline",)
    transformer_class = "Krea2Transformer2DModel"
    mask_argument = "prompt_embeds_mask"
    profile_of_family = flow_profile("krea2", guidance_scale=4.5, num_inference_steps=28)  # of the pipeline

    @property
    def undistilled_base(self) -> str | None:
        return "krea/Krea-2-Raw" if self.pipe.config.is_distilled else None

    @classmethod
    def published_names(cls, config: Mapping[str, Any]) -> PublishedNames:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return PublishedNames(
            "Krea-2",
            "krea2",
            resolution=1024,
            has_published_sizes=width == 6144,
            original_layer=partial(original_layer, names=KREA2, width=width),
        )

    @property
    def token_shape(self) -> tuple[int, ...]:
        config = self.denoiser.config
        return config.num_text_layers, config.text_hidden_dim

    def caption_states(self, caption: str) -> Tensor:
        """(length, layers, 2560); the padding between caption and template is cut out."""
        states, mask = self.pipe.encode_prompt([caption], max_sequence_length=self.max_sequence_length)
        return states[0][mask[0]]

    def caption_settings(self) -> dict[str, object]:
        layers = list(self.pipe.text_encoder_select_layers)
        return {**super().caption_settings(), "layers": layers}

    @classmethod
    def template_length(cls, pipe: DiffusionPipeline) -> int:
        # The states of the template before the caption are cut off, if it has the length it is known by.
        before = token_count(pipe.tokenizer, pipe.prompt_template_encode_prefix)
        behind = pipe.prompt_template_encode_num_suffix_tokens
        return before - pipe.prompt_template_encode_start_idx + behind

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        dtype = denoiser.dtype
        batch_size, channels, height, width = noisy.shape
        states = conditions[STATES].to(dtype)  # (B, L, layers, D)
        patch = self.pipe.patch_size
        positions = self.pipe.prepare_position_ids(
            states.shape[1], height // patch, width // patch, noisy.device
        )  # (L + N, 3)
        output = denoiser(
            self.pipe._pack_latents(noisy.to(dtype), batch_size, channels, height, width),  # (B, N, 4C)
            encoder_hidden_states=states,
            timestep=timesteps,
            position_ids=positions,
            encoder_attention_mask=mask_or_none(conditions[MASK]),
            return_dict=False,
        )[0]  # (B, N, 4C)
        factor = self.pipe.vae_scale_factor
        latents = self.pipe._unpack_latents(output, height * factor, width * factor)  # (B, C, 1, h, w)
        return latents.squeeze(2)

    @classmethod
    def decode_output(cls, pipe: DiffusionPipeline, output: Tensor, config: SamplingConfig) -> Tensor:
        height = config.height or RESOLUTION
        width = config.width or RESOLUTION
        latents = pipe._unpack_latents(output, height, width)  # (B, C, 1, h, w)
        return decode_video_latents(pipe, latents.squeeze(2))
