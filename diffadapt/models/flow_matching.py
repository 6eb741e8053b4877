"""The base class of the flow-matching families."""

from __future__ import annotations

from diffadapt.models.base import BASE_SAMPLING, BaseProfile
from diffadapt.models.flow_schedule import INAPPLICABLE_OPTIONS, FlowSchedule, flow_schedule
from diffadapt.models.noise_schedule import TimestepSampling
from diffadapt.models.transformer_base import TransformerBase, transformer_profile

# FLUX.1 dev and FLUX.2 dev learned to predict the result of guidance from its scale. A scale of 1, no
# guidance, is what the loss trains (github.com/black-forest-labs/flux, issue 79); images are sampled with
# another scale.
TRAINING_GUIDANCE = 1.0


class FlowMatchingBase(TransformerBase):
    """A transformer that predicts the velocity from latents to noise.

    `predict` takes noise levels s between 0 (latents) and 1 (noise), and returns noise - latents, whatever
    the transformer's own scale and sign are.
    """

    def training_schedule(self, sampling: TimestepSampling = BASE_SAMPLING) -> FlowSchedule:
        return flow_schedule(self.pipe.scheduler.config, sampling, patch_size=self.patch_size)


def flow_profile(
    name: str, *, guidance_scale: float, num_inference_steps: int, has_clip: bool = False
) -> BaseProfile:
    """The profile of a flow-matching family; the arguments are those of `transformer_profile`."""
    return transformer_profile(
        name,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        inapplicable_options=INAPPLICABLE_OPTIONS,
        has_clip=has_clip,
    )
