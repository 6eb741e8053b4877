"""Images from a pipeline: one seed per image, so that the noise is the same in any batch size."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffadapt.models.base import BaseModel
from diffadapt.models.caption_limits import TruncatedCaption, truncated_captions
from diffadapt.models.class_conditioned import ClassConditionedBase
from diffadapt.models.families import family_of_pipeline
from diffadapt.models.text_conditioned import TextConditionedBase

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "pndm": diffusers.PNDMScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}

# Encoded captions (B,) -> conditions of `BaseModel.collate_conditions`, each (B, ...)
PromptStates = Callable[[Sequence[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate.

    Attributes:
        prompt: of a text-conditioned base; else the image's title.
        seed: of the starting noise, and of the noise of stochastic schedulers.
        label: the class, for a class-conditioned base.
    """

    prompt: str
    seed: int
    label: int | None = None


@dataclass(frozen=True)
class SamplingConfig:
    """How images are generated; None stands for the pipeline's own setting.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        negative_prompt: what the images should not show.
        scheduler: a key of `SCHEDULERS`.
        height, width: in pixels.
        batch_size: images at once; changes speed and memory only.
        autocast: precision of the denoiser's activations.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    negative_prompt: str | None = None
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 4
    autocast: torch.dtype | None = None


def image_requests(prompt: str, count: int, *, seed: int = 0) -> list[ImageRequest]:
    """`count` images of one prompt with consecutive seeds."""
    return [ImageRequest(prompt, seed + i) for i in range(count)]


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline,
    requests: Sequence[ImageRequest],
    config: SamplingConfig,
    *,
    prompt_states: PromptStates | None = None,
) -> Iterator[Tensor]:
    """Yields batches of images (B, 3, H, W), float32 in [0, 1], in the order of the requests.

    Starting noise, and the noise of stochastic schedulers, come from one CPU generator per image.

    Args:
        prompt_states: gives the conditions of captions, so that the pipeline needs no text encoder; None to
            let the pipeline encode the prompts. It is asked for the captions of `captions_to_encode` only.

    Raises:
        ValueError: the pipeline does not take this size, scheduler or negative prompt.
    """
    _check_size(pipe, config)
    base_scheduler = pipe.scheduler
    if config.scheduler is not None:
        pipe.scheduler = _make_scheduler(pipe, config.scheduler)
    try:
        for start in range(0, len(requests), config.batch_size):
            batch = requests[start : start + config.batch_size]
            yield _generate_batch(pipe, batch, config, prompt_states)
    finally:
        pipe.scheduler = base_scheduler  # also where the caller stops early


def generate_all(
    pipe: DiffusionPipeline,
    requests: Sequence[ImageRequest],
    config: SamplingConfig,
    *,
    prompt_states: PromptStates | None = None,
) -> Tensor:
    """All images at once, (len(requests), 3, H, W), for small numbers."""
    return torch.cat(list(generate(pipe, requests, config, prompt_states=prompt_states)))


def generate_in_stages(
    model: BaseModel, requests: Sequence[ImageRequest], config: SamplingConfig
) -> Iterator[Tensor]:
    """As `generate`, with a base whose components are on the device only while they are needed.

    Text encoders and denoiser are on it together only where images cannot be sampled from encoded captions.
    """
    placement = model.placement
    prompt_states = None
    unneeded: set[str] = set()
    if model.samples_from_states:
        unneeded = set(model.text_encoders)
        with placement.on_device(model.text_encoders):
            prompts = [request.prompt for request in requests]
            prompt_states = _encode(model, captions_to_encode(type(model), prompts, config))
    placement.load_denoiser()
    with placement.on_device(model.pipe.components.keys() - unneeded):
        yield from generate(model.pipe, requests, config, prompt_states=prompt_states)


def _encode(model: BaseModel, captions: Sequence[str]) -> PromptStates:
    """Encodes captions; the result gives the conditions of any of them."""
    rows = {}
    for caption in captions:
        conditions = model.encode_captions([caption])
        rows[caption] = {name: value[0].cpu() for name, value in conditions.items()}
    return lambda texts: model.collate_conditions([rows[text] for text in texts])


def truncated_prompts(pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[TruncatedCaption]:
    """The distinct prompts of which a pipeline does not read the end; none where it has no tokenizers."""
    family = _family_to_call(pipe, has_labels=False)
    return truncated_captions(family.caption_limits(pipe), prompts)


def captions_to_encode(family: type[BaseModel], prompts: Sequence[str], config: SamplingConfig) -> list[str]:
    """The distinct captions that `generate` reads for these prompts: they, and the negative one."""
    captions = list(prompts)
    negative_caption = family.negative_caption(config)
    if negative_caption is not None:
        captions.append(negative_caption)
    return list(dict.fromkeys(captions))


def _generate_batch(
    pipe: DiffusionPipeline,
    requests: Sequence[ImageRequest],
    config: SamplingConfig,
    prompt_states: PromptStates | None,
) -> Tensor:
    family = _family_to_call(pipe, has_labels=requests[0].label is not None)
    arguments = family.pipeline_arguments(requests, config)
    if prompt_states is not None:
        del arguments["prompt"]
        arguments.pop("negative_prompt", None)
        arguments |= _embeddings(pipe, family, requests, config, prompt_states)
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
    with _autocast(pipe, config.autocast):
        output = pipe(
            **arguments,
            num_inference_steps=config.num_inference_steps,
            generator=generators,
        )
    return family.decode_output(pipe, output.images, config)


def _embeddings(
    pipe: DiffusionPipeline,
    family: type[BaseModel],
    requests: Sequence[ImageRequest],
    config: SamplingConfig,
    prompt_states: PromptStates,
) -> dict[str, object]:
    """The pipeline's arguments for encoded captions."""
    count = len(requests)
    captions = [request.prompt for request in requests]
    negative_caption = family.negative_caption(config)
    if negative_caption is not None:
        captions += [negative_caption] * count
    # One batch, since some pipelines want prompts and negative prompts of one length.
    positive = {}
    negative = {}
    for name, states in prompt_states(captions).items():
        states = states.to(pipe._execution_device)
        positive[name] = states[:count]
        negative[name] = states[count:]
    return family.embedding_arguments(positive, None if negative_caption is None else negative)


def _check_size(pipe: DiffusionPipeline, config: SamplingConfig) -> None:
    """Raises ValueError for a side that would be rounded, or cannot be cut into patches."""
    family = family_of_pipeline(type(pipe).__name__)
    multiple = 1 if family is None else family.sampling_size_multiple(pipe)
    for name in ("height", "width"):
        side = getattr(config, name)
        if side is not None and side % multiple:
            nearest = max(1, round(side / multiple)) * multiple
            raise ValueError(
                f"--{name} {side}: {type(pipe).__name__} generates images whose sides are multiples of "
                f"{multiple}, such as {nearest}"
            )


def _family_to_call(pipe: DiffusionPipeline, *, has_labels: bool) -> type[BaseModel]:
    """The family that knows how to call a pipeline; an unknown one is called by what is asked of it."""
    if has_labels and "class_labels" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"{type(pipe).__name__} takes no class labels; give it a prompt")
    family = family_of_pipeline(type(pipe).__name__)
    if family is not None:
        return family
    return ClassConditionedBase if has_labels else TextConditionedBase


def _make_scheduler(pipe: DiffusionPipeline, name: str) -> diffusers.SchedulerMixin:
    """The scheduler of that name with the settings of the pipeline's own.

    Raises:
        ValueError: the name is unknown, or the scheduler is of another kind than the base's.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; choose from {', '.join(SCHEDULERS)}")
    scheduler_class = SCHEDULERS[name]
    current = pipe.scheduler
    if not isinstance(current, scheduler_class) and scheduler_class not in current.compatibles:
        raise ValueError(
            f"--scheduler {name} does not fit this base: its {type(current).__name__} follows another noise "
            "schedule (such as flow matching), so images would be wrong; leave the option out"
        )
    is_flow = current.config.get("prediction_type") == "flow_prediction"
    if is_flow and "use_flow_sigmas" not in inspect.signature(scheduler_class).parameters:
        raise ValueError(
            f"--scheduler {name} does not fit this base, which predicts flows; leave the option out, or use "
            "dpm++ or unipc"
        )
    return scheduler_class.from_config(current.config)


def _autocast(pipe: DiffusionPipeline, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(pipe.device.type, dtype)
