"""From options to the first training step, the same for every script.

A script calls three functions, in the order of this file: `prepare_run` checks the options and loads the
base, `make_batches` encodes the data, `make_train_state` attaches the adapter and builds the optimizer.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Generic

from accelerate import Accelerator

import diffadapt as da
from diffadapt.adapters.adapter import Adapter
from diffadapt.common import runtime
from diffadapt.common.pipeline_components import AUTOENCODER
from diffadapt.common.precision import Precision, choose_precision
from diffadapt.data.batches import Batches
from diffadapt.data.examples import Example
from diffadapt.data.stream import Stream
from diffadapt.formats.export import parse_formats
from diffadapt.methods import Method
from diffadapt.models.base import BaseModel
from diffadapt.models.class_conditioned import ClassConditionedBase
from diffadapt.models.denoiser_loading import QUANTISED, check_denoiser_options
from diffadapt.models.families import load_base
from diffadapt.models.noise_schedule import TimestepSampling, parse_timestep_shift
from diffadapt.models.sampling import SamplingConfig, captions_to_encode
from diffadapt.training import output_folder
from diffadapt.training.adapter_options import (
    budget_notices,
    build_method,
    default_learning_rate,
    fit_to_budget,
    text_encoder_targets,
)
from diffadapt.training.base_defaults import base_profile, fill_missing
from diffadapt.training.encoder_offload import release_text_encoders
from diffadapt.training.loop import TrainState, initial_state
from diffadapt.training.objective import Objective
from diffadapt.training.option_checks import check_effects, check_ranges, check_text_encoder_lr
from diffadapt.training.options import OptionsT, TrainOptions
from diffadapt.training.push_to_hub import check_hub
from diffadapt.training.trackers import check_trackers, try_trackers

AdjustOptions = Callable[[OptionsT, BaseModel], OptionsT]


@dataclass(frozen=True)
class Setup(Generic[OptionsT]):
    """A run before it has data: complete options, the machine, the loaded base and the method."""

    options: OptionsT
    accelerator: Accelerator
    model: BaseModel
    method: Method
    started: float  # time.perf_counter()
    precision: Precision


def prepare_run(options: OptionsT, *, adjust_options: AdjustOptions | None = None) -> Setup[OptionsT]:
    """Checks what can be checked, starts the accelerator, loads the base and completes the options.

    Args:
        adjust_options: changes the options to fit the loaded base, where a script's adapter depends on it.

    Raises:
        ValueError, OSError: something does not fit; the message has the remedy.
    """
    started = time.perf_counter()
    runtime.silence_libraries()
    options, notices = _check_options(options)  # before the first seconds are spent on loading
    precision = choose_precision(
        options.mixed_precision,
        runtime.expected_device(),
        preferred=base_profile(options).defaults["preferred_precision"],
    )
    options = replace(options, mixed_precision=precision.name)
    accelerator = _start_accelerator(options)
    for notice in (*notices, *precision.notices, *_accumulation_notices(options)):
        accelerator.print(notice)
    model = _load_base(options, accelerator)
    for notice in distillation_notices(model, options):
        accelerator.print(notice)

    # What depends on the base: the method's rank, the resolution, the learning rate.
    if adjust_options is not None:
        options = adjust_options(options, model)
    method = fit_to_budget(options, build_method(options), model.pipe)
    for notice in budget_notices(options, method, model.pipe):
        accelerator.print(notice)
    learning_rate = default_learning_rate(options, method)
    options = fill_missing(options, {"resolution": model.resolution, "learning_rate": learning_rate})
    check_resolution(model, options.resolution)
    return Setup(options, accelerator, model, method, started, precision)


def make_batches(
    setup: Setup,
    examples: Sequence[Example] | Stream,
    *,
    prompts: Sequence[str] = (),
    **arguments: object,
) -> Batches:
    """Encodes the data and makes batches, by the options that all scripts share.

    The text encoders are freed where the run does not need them after that.

    Args:
        prompts: of the images that the run will sample, as far as they are no training captions.
        arguments: what a script adds to the arguments of `Batches`.
    """
    options = setup.options
    if setup.model.samples_from_states:
        prompts = captions_to_encode(type(setup.model), prompts, sampling_config(setup))
    else:
        prompts = ()  # the pipeline encodes them whenever it samples
    is_shared_cache = options.cache_latents == "disk"  # is filled by one process
    with setup.accelerator.main_process_first() if is_shared_cache else nullcontext():
        batches = Batches(
            setup.model,
            examples,
            resolution=options.resolution,
            center_crop=options.center_crop,
            random_flip=options.random_flip,
            noise_offset=options.noise_offset,
            timestep_sampling=timestep_sampling(options),
            cache_latents=options.cache_latents,
            cache_dir=options.cache_dir,
            seed=options.seed,
            is_dry_run=options.dry_run,
            prompts=prompts,
            **arguments,
        )
    release_text_encoders(setup.model, batches, options)
    if batches.is_streaming:
        # Steps encode images, and so do reports that ask for the first ones.
        setup.model.placement.to_device([AUTOENCODER])
    return batches


def make_train_state(setup: Setup, *, prior_weight: float | None = None) -> TrainState:
    """Attaches the adapter and prepares objective and optimizer, at step 0; `Run` restores checkpoints.

    Args:
        prior_weight: weight of the class images' loss; None when there are none.
    """
    options = setup.options
    model = setup.model
    model.placement.load_denoiser()
    trained = [model.denoiser_name]
    if options.train_text_encoder:
        trained += model.text_encoders
    model.placement.to_device(trained)
    if options.assistant_adapter is not None:
        attach_assistant(model, options)
    adapter = da.attach(
        model.pipe,
        setup.method,
        targets=options.targets,
        text_encoder_targets=text_encoder_targets(options),
        seed=options.seed,
    )
    objective = Objective(
        model.denoiser,
        adapter,
        predict=model.predict,
        schedule=model.training_schedule(timestep_sampling(options)),
        prior_weight=prior_weight,
        snr_gamma=options.snr_gamma,
    )
    train_state = initial_state(setup.accelerator, objective, options)
    train_state.precision = setup.precision
    return train_state


def attach_assistant(model: BaseModel, options: TrainOptions) -> Adapter:
    """Attaches the frozen adapter that works while the other one is trained.

    Raises:
        FileNotFoundError, ValueError: as `da.load`; ValueError with a sharded base too.
    """
    if options.shard_base:
        raise ValueError("--assistant_adapter is not sharded: leave it or --shard_base out")
    assistant = da.load(model.pipe, options.assistant_adapter, name="assistant")
    assistant.to(model.placement.device).requires_grad_(False).eval()
    return assistant


def distillation_notices(model: BaseModel, options: TrainOptions) -> list[str]:
    """A line for a base that was distilled for few steps, which training would undo."""
    if model.undistilled_base is None or options.assistant_adapter is not None:
        return []
    return [
        f"warning: {model.source} was distilled to need few steps or no guidance, and training undoes that: "
        f"train on {model.undistilled_base} and sample with `diffadapt sample --base {model.source}`, or "
        "name an --assistant_adapter made for this base"
    ]


def sampling_config(setup: Setup) -> SamplingConfig:
    """How the run samples images."""
    options = setup.options
    return SamplingConfig(
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        batch_size=options.sample_batch_size,
        height=options.resolution,
        width=options.resolution,
        autocast=runtime.autocast_dtype(setup.accelerator),
    )


def timestep_sampling(options: TrainOptions) -> TimestepSampling:
    """How the noise levels of a flow-matching base are sampled."""
    return TimestepSampling(options.timestep_density, parse_timestep_shift(options.timestep_shift))


def check_resolution(model: BaseModel, resolution: int) -> None:
    """Checks that the base can have a training size.

    Raises:
        ValueError: it does not; the message has the sizes that it can have.
    """
    step, smallest = model.square_limits
    if resolution == model.resolution or (resolution % step == 0 and resolution >= smallest):
        return
    nearest = max(smallest, round(resolution / step) * step)
    raise ValueError(
        f"--resolution {resolution}: {model.source} takes multiples of {step} from {smallest} on, such as "
        f"{nearest}; its own size is {model.resolution}"
    )


def _check_options(options: OptionsT) -> tuple[OptionsT, list[str]]:
    """Checks everything that can be checked without the base and the accelerator.

    Returns:
        The options with the output folder to use, and lines to print about it.
    """
    check_ranges(options)
    parse_formats(options.export_formats)
    check_effects(options, base_profile(options))
    check_text_encoder_lr(options)
    _check_denoiser_source(options)
    options, notices = output_folder.resolve_output_dir(options)
    output_folder.check_outside_data(options)
    output_folder.check_outside_models(options)
    check_trackers(options.report_to)
    check_hub(options)
    build_method(options)  # for its errors; what it builds may still change with the base
    return options, notices


def _check_denoiser_source(options: TrainOptions) -> None:
    """Checks `--base_precision` and `--transformer` before anything is loaded.

    Raises:
        ValueError, ImportError, FileNotFoundError: it cannot be loaded so; the message has the remedy.
    """
    is_quantised = options.base_precision in QUANTISED
    check_denoiser_options(options.base_precision if is_quantised else None, options.transformer)
    if is_quantised or options.transformer is not None:
        for name in ("shard_base", "offload_blocks"):
            if getattr(options, name):
                raise ValueError(
                    f"--{name} moves plain weights alone: leave it out, or --base_precision and --transformer"
                )


def _start_accelerator(options: TrainOptions) -> Accelerator:
    """The accelerator; the main process tries the trackers and every folder that will be written."""
    trackers = check_trackers(options.report_to)
    accelerator = runtime.make_accelerator(
        mixed_precision=options.mixed_precision,
        num_threads=options.num_threads,
        trackers=trackers,
        logging_dir=options.logging_dir or f"{options.output_dir}/logs",
    )
    if accelerator.is_main_process:
        try_trackers(trackers)
        for name, folder in output_folder.output_folders(options).items():
            output_folder.check_writable(folder, name)
        output_folder.check_subfolders(options.output_dir)
    return accelerator


def _load_base(options: TrainOptions, accelerator: Accelerator) -> BaseModel:
    """The frozen base, in main memory; `BaseModel.placement` brings it to its device part by part.

    Raises:
        ValueError: the base is class-conditional in a script of captions, or it excludes an option.
    """
    is_quantised = options.base_precision in QUANTISED
    plain_precision = None if is_quantised else options.base_precision
    model = load_base(
        options.pretrained_model_name_or_path,
        device=accelerator.device,
        dtype=runtime.weight_dtype(accelerator, plain_precision),
        revision=options.revision,
        variant=options.variant,
        vae=options.pretrained_vae_model_name_or_path,
        prediction_type=options.prediction_type,
        base_precision=options.base_precision if is_quantised else None,
        transformer=options.transformer,
        is_staged=True,
        is_shapes_only=options.dry_run and not _needs_weights(options),
        text_encoder_device=options.text_encoder_device,
        resident_blocks=options.offload_blocks,
    )
    if options.text_encoder_device is not None and not model.samples_from_states:
        raise ValueError(
            f"--text_encoder_device {options.text_encoder_device}: {model.source} needs its text encoders "
            "beside the denoiser to generate images; leave the option out"
        )
    if isinstance(model, ClassConditionedBase) and not hasattr(options, "class_labels"):
        raise ValueError(
            f"{model.source} is conditioned on classes, not captions; use train_scripts/class_conditional.py"
        )
    if options.train_text_encoder:
        model.enable_text_encoder_training()
    return model


def _needs_weights(options: TrainOptions) -> bool:
    """Whether a dry run computes with the models, beside those that are encoded with beforehand."""
    is_streaming = getattr(options, "streaming", False)
    return options.train_text_encoder or is_streaming or options.assistant_adapter is not None


def _accumulation_notices(options: TrainOptions) -> list[str]:
    """A line where the option and the launcher name different numbers of microsteps."""
    launcher_steps = runtime.launcher_accumulation()
    steps = options.gradient_accumulation_steps
    if launcher_steps in (1, steps):
        return []
    return [f"--gradient_accumulation_steps {steps} is used, not the launcher's {launcher_steps}"]
