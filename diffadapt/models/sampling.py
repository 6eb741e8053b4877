"""Images from a pipeline: one seed per image, so that the noise is the same in any batch size."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffadapt.models.latent_base import to_autoencoder

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "pndm": diffusers.PNDMScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


@dataclass(frozen=True)
class ImageRequest:
    """One image to make."""

    prompt: str
    seed: int
    label: int | None = None  # the class, for a base that is told classes instead of words


@dataclass(frozen=True)
class SamplingConfig:
    """How images are made; None stands for the pipeline's own setting."""

    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    negative_prompt: str | None = None
    scheduler: str | None = None  # key of SCHEDULERS
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    batch_size: int = 4  # images at once; changes speed and memory only
    autocast: torch.dtype | None = None  # precision of the denoiser's activations


def image_requests(prompt: str, count: int, *, seed: int = 0) -> list[ImageRequest]:
    """`count` images of one prompt with consecutive seeds."""
    return [ImageRequest(prompt, seed + i) for i in range(count)]


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline, wanted: Sequence[ImageRequest], sampler: SamplingConfig
) -> Iterator[Tensor]:
    """Yields batches of images (B, 3, H, W), float32 in [0, 1], in the order of `wanted`.

    Starting noise, and the noise of stochastic schedulers, come from one CPU generator per image.
    """
    own_scheduler = pipe.scheduler
    if sampler.scheduler is not None:
        pipe.scheduler = _scheduler(pipe, sampler.scheduler)
    try:
        for start in range(0, len(wanted), sampler.batch_size):
            yield _batch(pipe, wanted[start : start + sampler.batch_size], sampler)
    finally:
        pipe.scheduler = own_scheduler


def generate_all(pipe: DiffusionPipeline, wanted: Sequence[ImageRequest], sampler: SamplingConfig) -> Tensor:
    """(len(wanted), 3, H, W): all images at once, for small numbers."""
    return torch.cat(list(generate(pipe, wanted, sampler)))


def _batch(pipe: DiffusionPipeline, wanted: Sequence[ImageRequest], sampler: SamplingConfig) -> Tensor:
    if wanted[0].label is not None:
        return _batch_of_classes(pipe, wanted, sampler)
    with _autocast(pipe, sampler.autocast):
        latents = pipe(
            prompt=[shot.prompt for shot in wanted],
            negative_prompt=None
            if sampler.negative_prompt is None
            else [sampler.negative_prompt] * len(wanted),
            num_inference_steps=sampler.num_inference_steps,
            guidance_scale=sampler.guidance_scale,
            height=sampler.height,
            width=sampler.width,
            generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in wanted],
            output_type="latent",
        ).images
    return _decode(pipe, latents)


def _batch_of_classes(
    pipe: DiffusionPipeline, wanted: Sequence[ImageRequest], sampler: SamplingConfig
) -> Tensor:
    """From a pipeline that takes ``class_labels``, such as DiTPipeline; it decodes its latents itself."""
    if "class_labels" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"{type(pipe).__name__} takes no class labels; give it a prompt")
    with _autocast(pipe, sampler.autocast):
        images = pipe(
            class_labels=[shot.label for shot in wanted],
            num_inference_steps=sampler.num_inference_steps,
            guidance_scale=sampler.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in wanted],
            output_type="np",
        ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


def _decode(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Latents to images in the autoencoder's own precision; in float32 where fp16 would overflow."""
    vae = pipe.vae
    own, overflows = vae.dtype, vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if overflows:
        vae.to(torch.float32)
    pixels = vae.decode(to_autoencoder(vae, latents.to(vae.dtype)), return_dict=False)[0]
    if overflows:
        vae.to(own)
    return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()


def _scheduler(pipe: DiffusionPipeline, name: str) -> diffusers.SchedulerMixin:
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; choose from {', '.join(SCHEDULERS)}")
    kind, current = SCHEDULERS[name], pipe.scheduler
    if not isinstance(current, kind) and kind not in current.compatibles:
        raise ValueError(
            f"--scheduler {name} does not fit this base: its {type(current).__name__} follows another noise "
            "schedule (such as flow matching), so images would be wrong; leave the option out"
        )
    is_flow = current.config.get("prediction_type") == "flow_prediction"
    if is_flow and "use_flow_sigmas" not in inspect.signature(kind).parameters:
        raise ValueError(
            f"--scheduler {name} does not fit this base, which predicts flows; leave the option out, or use "
            "dpm++ or unipc"
        )
    return kind.from_config(current.config)


def _autocast(pipe: DiffusionPipeline, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(pipe.device.type, dtype)
