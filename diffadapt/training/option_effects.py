"""Options that would change nothing are errors: for each option, the condition under which it has an effect.

Every option of every training script is in `CONDITIONS` or `ALWAYS`; a test walks over them.
"""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

from diffadapt.models.base import BaseProfile
from diffadapt.models.base_names import is_embedded
from diffadapt.training.options import TrainOptions

ADAM = ("adamw", "adamw8bit", "prodigy")

ALWAYS = frozenset(
    (
        *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "prediction_type"),
        *("output_dir", "seed", "resolution", "center_crop", "random_flip", "cache_latents"),
        *("train_batch_size", "adapter", "adapter_options", "targets", "train_text_encoder"),
        *("max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
        *("overwrite_output_dir", "dry_run", "gradient_accumulation_steps", "shard_base"),
        *("gradient_checkpointing", "optimizer", "optimizer_options", "learning_rate", "lr_scheduler"),
        *("max_grad_norm", "use_ema", "snr_gamma", "noise_offset", "skip_nonfinite", "mixed_precision"),
        *("base_precision", "num_threads", "log_adapter_stats", "report_to", "export_formats"),
        *("push_to_hub", "config", "rank", "scale", "param_budget"),
        # generated images: a command line may switch them off with --num_validation_images 0
        *("num_validation_images", "num_inference_steps", "guidance_scale", "sample_batch_size", "extractor"),
        "validation_steps",
        # options of the scripts
        *("instance_data_dir", "instance_prompt", "instance_captions", "class_prompt"),
        *("with_prior_preservation", "train_data_dir", "dataset_name", "image_column", "caption_column"),
        *("max_train_samples", "validation_data_dir", "trigger_word", "caption_dropout"),
        *("aspect_ratio_buckets", "streaming", "held_out", "class_labels", "new_class_table"),
        *("label_dropout", "max_held_out_samples", "follow_links"),
    )
)


@dataclasses.dataclass(frozen=True)
class Condition:
    """When an option has an effect."""

    holds: Callable[[TrainOptions], bool]
    needs: str  # what to give for it, for the message


def _on_hub(options: TrainOptions) -> bool:
    name = options.pretrained_model_name_or_path or ""
    return not is_embedded(name) and not Path(name).expanduser().exists()


def _is_set(name: str) -> Condition:
    return Condition(lambda options: bool(getattr(options, name, None)), f"--{name}")


CONDITIONS = {
    "revision": Condition(_on_hub, "a base on the hub"),
    "variant": Condition(
        lambda options: not is_embedded(options.pretrained_model_name_or_path or ""), "another base"
    ),
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
    **{
        name: Condition(
            lambda options: options.optimizer.lower() in ADAM,
            f"--optimizer {', '.join(ADAM)}; for others use --optimizer_options, as weight_decay=0.01",
        )
        for name in ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
    },
    "ema_decay": _is_set("use_ema"),
    "validation_prompt": Condition(
        lambda options: not hasattr(options, "class_labels"), "a base that is conditioned on captions"
    ),
    "logging_dir": Condition(lambda options: options.report_to != "none", "--report_to"),
    "hub_model_id": _is_set("push_to_hub"),
    "hub_private": _is_set("push_to_hub"),
    "class_data_dir": _is_set("with_prior_preservation"),
    "prior_loss_weight": _is_set("with_prior_preservation"),
    "num_class_images": _is_set("with_prior_preservation"),
    "dataset_config_name": _is_set("dataset_name"),
    "split": _is_set("dataset_name"),
    "label_column": _is_set("dataset_name"),
    "shuffle_buffer": _is_set("streaming"),
}


SCHEDULE_OPTIONS = ("lr_warmup_steps", "lr_num_cycles", "lr_power")


def check_effects(
    options: TrainOptions, profile: BaseProfile | None = None, *, names: Collection[str] | None = None
) -> None:
    """Raises: ValueError for an option that was given and has no effect, naming what it needs.

    Given is what differs from the default of the option and from that of the base's profile, so that the
    config.yaml of a run, which holds every option, can be used again.

    Args:
        names: of the options that are checked; None: all.
    """
    defaults = {} if profile is None else profile.defaults
    for field in dataclasses.fields(options):
        if names is not None and field.name not in names:
            continue
        condition = CONDITIONS.get(field.name)
        value = getattr(options, field.name)
        is_default = value == field.default or value == defaults.get(field.name, field.default)
        if condition is None or is_default or condition.holds(options):
            continue
        raise ValueError(f"--{field.name} {value} has no effect: it needs {condition.needs}")
