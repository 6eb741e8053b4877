"""The size of the images that a pipeline generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffadapt.models.sampling import SamplingConfig


def image_size(pipe: DiffusionPipeline, config: SamplingConfig) -> tuple[int, int]:
    """Height and width in pixels; where the configuration has none, the pipeline's own."""
    side = pipe.default_sample_size * pipe.vae_scale_factor
    return config.height or side, config.width or side
