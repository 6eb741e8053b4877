"""From options to a train_state at the first step: what every script does in the same way."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Generic

from accelerate import Accelerator

import diffadapt as da
from diffadapt.common import runtime
from diffadapt.common.precision import Precision, choose_precision
from diffadapt.data.batches import Batches
from diffadapt.data.examples import Example
from diffadapt.data.stream import Stream
from diffadapt.formats.export import parse_formats
from diffadapt.methods import Method
from diffadapt.models.base import BaseModel
from diffadapt.models.class_conditioned import ClassConditionedBase
from diffadapt.models.families import load_base
from diffadapt.training import output_folder
from diffadapt.training.base_defaults import (
    base_profile,
    budget_notices,
    build_method,
    check_ranges,
    check_text_encoders,
    filled,
    fitted,
    preferred_precision,
    recommended_rate,
    text_targets,
)
from diffadapt.training.loop import TrainState, initial_state
from diffadapt.training.objective import Objective
from diffadapt.training.option_effects import check_effects
from diffadapt.training.options import OptionsT, TrainOptions
from diffadapt.training.push_to_hub import check_hub
from diffadapt.training.trackers import check_trackers, try_trackers


@dataclass(frozen=True)
class Setup(Generic[OptionsT]):
    """What a run works with, before there is data."""

    options: OptionsT  # complete
    accelerator: Accelerator
    model: BaseModel
    method: Method
    started: float  # time.perf_counter()
    precision: Precision


def prepare_run(
    options: OptionsT, *, fitting: Callable[[OptionsT, BaseModel], OptionsT] | None = None
) -> Setup[OptionsT]:
    """Checks what can be checked, starts the accelerator, loads the base and completes the options.

    Args:
        fitting: the options as they fit the loaded base, where a script's adapter depends on it.
    Raises: ValueError or OSError with the remedy.
    """
    started = time.perf_counter()
    runtime.silence_libraries()
    check_ranges(options)
    parse_formats(options.export_formats)
    check_effects(options, base_profile(options))
    options, notices = output_folder.resolve_output_dir(options)
    output_folder.check_outside_data(options)
    output_folder.check_outside_models(options)
    trackers = check_trackers(options.report_to)
    check_hub(options)
    method = build_method(options)
    check_text_encoders(options)
    precision = choose_precision(
        options.mixed_precision, runtime.expected_device(), preferred=preferred_precision(options)
    )
    options = replace(options, mixed_precision=precision.name)
    accelerator = runtime.make_accelerator(
        mixed_precision=precision.name,
        num_threads=options.num_threads,
        trackers=trackers,
        logging_dir=options.logging_dir or f"{options.output_dir}/logs",
    )
    if accelerator.is_main_process:
        try_trackers(trackers)
        for name, folder in output_folder.output_folders(options).items():
            output_folder.check_writable(folder, name)
        output_folder.check_subfolders(options.output_dir)
    for notice in (*notices, *precision.notices, *accumulation_notices(options)):
        accelerator.print(notice)
    model = load_base(
        options.pretrained_model_name_or_path,
        device=accelerator.device,
        dtype=runtime.weight_dtype(accelerator, options.base_precision),
        revision=options.revision,
        variant=options.variant,
        vae=options.pretrained_vae_model_name_or_path,
        prediction_type=options.prediction_type,
    )
    check_conditioning(options, model)
    if options.train_text_encoder:
        model.enable_text_encoder_training()
    if fitting is not None:
        options = fitting(options, model)
        method = build_method(options)
    method = fitted(options, method, model.pipe)
    for notice in budget_notices(options, method, model.pipe):
        accelerator.print(notice)
    known = {"resolution": model.resolution, "learning_rate": recommended_rate(options, method)}
    options = filled(options, known)
    check_resolution(model, options.resolution)
    return Setup(options, accelerator, model, method, started, precision)


def accumulation_notices(options: TrainOptions) -> list[str]:
    """A line where the option and the launcher name different numbers of microsteps."""
    exported = runtime.launcher_accumulation()
    used = options.gradient_accumulation_steps
    if exported in (1, used):
        return []
    return [f"--gradient_accumulation_steps {used} is used, not the launcher's {exported}"]


def check_conditioning(options: TrainOptions, model: BaseModel) -> None:
    """Raises: ValueError for a base that is conditioned on classes in a script of captions."""
    if isinstance(model, ClassConditionedBase) and not hasattr(options, "class_labels"):
        raise ValueError(f"{model.source} is told classes, not words; use train_scripts/class_conditional.py")


def check_resolution(model: BaseModel, resolution: int) -> None:
    """Raises: ValueError for a training size that the base cannot have, with the sizes that it can."""
    step, smallest = model.square_limits
    if resolution == model.resolution or (resolution % step == 0 and resolution >= smallest):
        return
    nearest = max(smallest, round(resolution / step) * step)
    raise ValueError(
        f"--resolution {resolution}: {model.source} takes multiples of {step} from {smallest} on, such as "
        f"{nearest}; its own size is {model.resolution}"
    )


def make_batches(setup: Setup, examples: Sequence[Example] | Stream, **further: object) -> Batches:
    """The batches of a run, by the options that all scripts share; a cache on disk is filled by one process.

    Args:
        further: what a script adds to the arguments of `Batches`.
    """
    options = setup.options
    shared = options.cache_latents == "disk"
    with setup.accelerator.main_process_first() if shared else nullcontext():
        return Batches(
            setup.model,
            examples,
            resolution=options.resolution,
            center_crop=options.center_crop,
            random_flip=options.random_flip,
            noise_offset=options.noise_offset,
            cache_latents=options.cache_latents,
            cache_dir=options.cache_dir,
            seed=options.seed,
            is_dry_run=options.dry_run,
            **further,
        )


def make_train_state(setup: Setup, *, prior_weight: float | None = None) -> TrainState:
    """Attaches the adapter and prepares objective and optimizer, at step 0; `Run` puts a checkpoint into it.

    Args:
        prior_weight: weight of the class pictures' loss; None when there are none.
    """
    options, model = setup.options, setup.model
    adapter = da.attach(
        model.pipe,
        setup.method,
        targets=options.targets,
        text_encoder_targets=text_targets(options),
        seed=options.seed,
    )
    objective = Objective(
        model.denoiser,
        adapter,
        predict=model.predict,
        schedule=model.training_schedule(),
        prior_weight=prior_weight,
        snr_gamma=options.snr_gamma,
    )
    train_state = initial_state(setup.accelerator, objective, options)
    train_state.precision = setup.precision
    return train_state
