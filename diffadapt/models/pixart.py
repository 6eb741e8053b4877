"""PixArt-Sigma: T5's states with a mask, a diffusion transformer trained on a schedule of betas.

Chen et al. 2024 (arXiv 2403.04692); in the layout of PixArtSigmaPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffadapt.adapters.architectures import PublishedNames
from diffadapt.formats.transformer_names import PIXART, original_layer
from diffadapt.models.base import INAPPLICABLE_TO_BETAS
from diffadapt.models.masked_captions import MASK, STATES, MaskedCaptionsBase
from diffadapt.models.transformer_base import transformer_profile

if TYPE_CHECKING:
    from diffadapt.models.sampling import ImageRequest, SamplingConfig


class PixArtSigma(MaskedCaptionsBase):
    """A loaded base of this family."""

    family = "pixart_sigma"
    pipeline_classes = ("PixArtSigmaPipeline",)
    transformer_class = "PixArtTransformer2DModel"
    mask_argument = "prompt_attention_mask"
    profile_of_family = transformer_profile(
        "pixart_sigma",
        guidance_scale=4.5,  # of the pipeline, as are the steps
        num_inference_steps=20,
        inapplicable_options=INAPPLICABLE_TO_BETAS,
    )
    max_sequence_length = 300

    @classmethod
    def published_names(cls, config: Mapping[str, Any]) -> PublishedNames:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return PublishedNames(
            "pixart-sigma",
            "pixart_sigma",
            resolution=1024,
            has_published_sizes=width == 1152,
            original_layer=partial(original_layer, names=PIXART, width=width),
        )

    @property
    def resolution(self) -> int:
        return self.denoiser.config.sample_size * self.pipe.vae_scale_factor

    @property
    def token_shape(self) -> tuple[int, ...]:
        return (self.denoiser.config.caption_channels,)

    def caption_states(self, caption: str) -> Tensor:
        """(length, 4096)"""
        states, mask, _, _ = self.pipe.encode_prompt(
            [caption], do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return states[0][mask[0].bool()]

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        dtype = denoiser.dtype
        output = denoiser(
            noisy.to(dtype),
            encoder_hidden_states=conditions[STATES].to(dtype),
            encoder_attention_mask=conditions[MASK].to(dtype),
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},  # of PixArt-Alpha only
            return_dict=False,
        )[0]
        # The other half is a learned variance, which the pipeline does not use either.
        return output[:, : noisy.shape[1]]

    @classmethod
    def guidance_arguments(cls, count: int, config: SamplingConfig) -> dict[str, object]:
        return {"guidance_scale": config.guidance_scale, "negative_prompt": config.negative_prompt or ""}

    @classmethod
    def embedding_arguments(
        cls, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None
    ) -> dict[str, object]:
        # The pipeline's default of the negative prompt is a text, which it refuses beside states.
        return {**super().embedding_arguments(positive, negative), "negative_prompt": None}

    @classmethod
    def pipeline_arguments(
        cls, requests: Sequence[ImageRequest], config: SamplingConfig
    ) -> dict[str, object]:
        arguments = super().pipeline_arguments(requests, config)
        # Otherwise the pipeline replaces the size by the nearest one of a list.
        return {**arguments, "use_resolution_binning": False}
