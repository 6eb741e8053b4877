"""Checks of option values before anything is loaded: ranges, and options that would have no effect.

Every option of every training script is in `CONDITIONS` or `ALWAYS`; a test walks over them.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from pathlib import Path

from diffadapt.common.number_ranges import require_seed
from diffadapt.models.base import BaseProfile
from diffadapt.models.noise_schedule import parse_timestep_shift
from diffadapt.training.options import TrainOptions

ADAM_OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
OPTIMIZER_DEFAULT_LR = {"prodigy": 1.0}  # optimizers that estimate the rate: theirs is a factor of it

FRACTION_OPTIONS = ("caption_dropout", "label_dropout", "ema_decay", "adam_beta1", "adam_beta2")
MINIMUM_VALUES = {  # the smallest values that make sense
    "resolution": 1,
    "train_batch_size": 1,
    "max_train_steps": 1,
    "checkpoints_total_limit": 1,
    "gradient_accumulation_steps": 1,
    "lr_num_cycles": 1,
    "validation_steps": 1,
    "log_adapter_stats": 1,
    "num_inference_steps": 1,
    "sample_batch_size": 1,
    "num_class_images": 1,
    "max_train_samples": 1,
    "shuffle_buffer": 1,
    "num_threads": 1,
    "offload_blocks": 1,
    "checkpointing_steps": 0,
    "lr_warmup_steps": 0,
    "learning_rate": 0,
    "text_encoder_lr": 0,
    "max_grad_norm": 0,
    "snr_gamma": 0,
    "noise_offset": 0,
    "skip_nonfinite": 0,
    "num_validation_images": 0,
    "guidance_scale": 0,
    "prior_loss_weight": 0,
    "adam_epsilon": 0,
    "adam_weight_decay": 0,
}
MAY_BE_INFINITE = ("max_grad_norm", "snr_gamma")  # nothing is clipped; all timesteps weigh the same

ALWAYS = frozenset(  # options that have an effect whatever the others are
    (
        "pretrained_model_name_or_path",
        "pretrained_vae_model_name_or_path",
        "transformer",
        "prediction_type",
        "output_dir",
        "seed",
        "follow_links",
        "resolution",
        "center_crop",
        "random_flip",
        "cache_latents",
        "train_batch_size",
        "adapter",
        "rank",
        "scale",
        "adapter_options",
        "param_budget",
        "targets",
        "train_text_encoder",
        "assistant_adapter",
        "max_train_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "dry_run",
        "gradient_accumulation_steps",
        "shard_base",
        "gradient_checkpointing",
        "optimizer",
        "optimizer_options",
        "learning_rate",
        "lr_scheduler",
        "max_grad_norm",
        "use_ema",
        "snr_gamma",
        "noise_offset",
        "timestep_density",
        "timestep_shift",
        "skip_nonfinite",
        "mixed_precision",
        "base_precision",
        "num_threads",
        "log_adapter_stats",
        "report_to",
        "export_formats",
        "push_to_hub",
        "config",
        # Generated images: a command line may switch them off with --num_validation_images 0.
        "num_validation_images",
        "validation_steps",
        "num_inference_steps",
        "guidance_scale",
        "sample_batch_size",
        "extractor",
        # Options of the scripts.
        "instance_data_dir",
        "instance_prompt",
        "instance_captions",
        "class_prompt",
        "with_prior_preservation",
        "train_data_dir",
        "dataset_name",
        "image_column",
        "caption_column",
        "max_train_samples",
        "validation_data_dir",
        "trigger_word",
        "caption_dropout",
        "aspect_ratio_buckets",
        "streaming",
        "held_out",
        "max_held_out_samples",
        "class_labels",
        "new_class_table",
        "label_dropout",
    )
)
SCHEDULE_OPTIONS = ("lr_warmup_steps", "lr_num_cycles", "lr_power")


@dataclasses.dataclass(frozen=True)
class Condition:
    """The condition under which an option has an effect."""

    holds: Callable[[TrainOptions], bool]
    needs: str  # what to give for it, for the message


def _is_set(name: str) -> Condition:
    return Condition(lambda options: bool(getattr(options, name, None)), f"--{name}")


def _has_hub_base(options: TrainOptions) -> bool:
    name = options.pretrained_model_name_or_path or ""
    return not options.is_demo and not Path(name).expanduser().exists()


def _has_own_base(options: TrainOptions) -> bool:
    return not options.is_demo


def _is_adam(options: TrainOptions) -> bool:
    return options.optimizer.lower() in ADAM_OPTIMIZERS


ADAM_CONDITION = Condition(
    _is_adam,
    f"--optimizer {', '.join(ADAM_OPTIMIZERS)}; for others use --optimizer_options, as weight_decay=0.01",
)
CONDITIONS = {
    "revision": Condition(_has_hub_base, "a base on the hub"),
    "variant": Condition(_has_own_base, "another base"),
    "alpha": Condition(lambda options: options.scale is None, "no --scale, which replaces it"),
    "cache_dir": Condition(lambda options: options.cache_latents == "disk", "--cache_latents disk"),
    "text_encoder_targets": _is_set("train_text_encoder"),
    "text_encoder_lr": _is_set("train_text_encoder"),
    "accept_changes": _is_set("resume_from_checkpoint"),
    "lr_warmup_steps": Condition(
        lambda options: options.lr_scheduler != "constant", "--lr_scheduler constant_with_warmup or another"
    ),
    "lr_num_cycles": Condition(
        lambda options: options.lr_scheduler == "cosine_with_restarts", "--lr_scheduler cosine_with_restarts"
    ),
    "lr_power": Condition(lambda options: options.lr_scheduler == "polynomial", "--lr_scheduler polynomial"),
    "adam_beta1": ADAM_CONDITION,
    "adam_beta2": ADAM_CONDITION,
    "adam_weight_decay": ADAM_CONDITION,
    "adam_epsilon": ADAM_CONDITION,
    "ema_decay": _is_set("use_ema"),
    "validation_prompt": Condition(
        lambda options: not hasattr(options, "class_labels"), "a base that is conditioned on captions"
    ),
    "logging_dir": Condition(lambda options: options.report_to != "none", "--report_to"),
    "hub_model_id": _is_set("push_to_hub"),
    "hub_private": _is_set("push_to_hub"),
    "offload_blocks": Condition(lambda options: not options.shard_base, "no --shard_base"),
    "text_encoder_device": Condition(
        lambda options: not options.train_text_encoder and not getattr(options, "streaming", False),
        "captions that are encoded once: no --train_text_encoder and no --streaming",
    ),
    "class_data_dir": _is_set("with_prior_preservation"),
    "prior_loss_weight": _is_set("with_prior_preservation"),
    "num_class_images": _is_set("with_prior_preservation"),
    "dataset_config_name": _is_set("dataset_name"),
    "split": _is_set("dataset_name"),
    "label_column": _is_set("dataset_name"),
    "shuffle_buffer": _is_set("streaming"),
}


def check_ranges(options: TrainOptions) -> None:
    """Checks that numbers make sense.

    Raises:
        ValueError: a number is out of range; the message has the option, its value and the range.
    """
    require_seed(options.seed)
    parse_timestep_shift(options.timestep_shift)
    if options.snr_gamma == 0:
        raise ValueError("--snr_gamma 0 gives every timestep no weight; leave it out, or give 5 as the paper")
    for name in FRACTION_OPTIONS:
        value = getattr(options, name, None)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{name} is a share between 0 and 1, got {value}")
    for name, minimum in MINIMUM_VALUES.items():
        value = getattr(options, name, None)
        if value is not None and not value >= minimum:  # true of NaN, too
            raise ValueError(f"--{name} must be at least {minimum}, got {value}")
        if value == math.inf and name not in MAY_BE_INFINITE:
            raise ValueError(f"--{name} must be a finite number, got {value}")


def check_effects(
    options: TrainOptions, profile: BaseProfile | None = None, *, names: Collection[str] | None = None
) -> None:
    """Checks that every option that was given has an effect.

    Given is what differs from the default of the option and from that of the base's profile, so that the
    config.yaml of a run, which holds every option, can be used again.

    Args:
        names: of the options that are checked; None: all.

    Raises:
        ValueError: an option has none; the message says what it needs, or why it does not apply to the base.
    """
    base_defaults = {} if profile is None else profile.defaults
    reasons = {} if profile is None else profile.inapplicable_options
    for field in dataclasses.fields(options):
        if names is not None and field.name not in names:
            continue
        if field.name in reasons and getattr(options, field.name) != field.default:
            raise ValueError(f"--{field.name} {getattr(options, field.name)}: {reasons[field.name]}")
        condition = CONDITIONS.get(field.name)
        if condition is None or condition.holds(options):
            continue
        value = getattr(options, field.name)
        # a value that was filled in for the base is not one that somebody gave
        if value in (field.default, base_defaults.get(field.name, field.default)):
            continue
        raise ValueError(f"--{field.name} {value} has no effect: it needs {condition.needs}")


def check_text_encoder_lr(options: TrainOptions) -> None:
    """Refuses a learning rate of the text encoders where the optimizer estimates one for everything.

    Raises:
        ValueError: both are given; the message has the remedy.
    """
    if options.text_encoder_lr is not None and options.optimizer.lower() in OPTIMIZER_DEFAULT_LR:
        raise ValueError(
            f"--text_encoder_lr: {options.optimizer} finds one rate for everything; leave it out, or take "
            "another --optimizer"
        )
