"""Which options and data of a run may change when it is resumed from a checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffadapt.common.messages import did_you_mean
from diffadapt.training.checkpoint.data_record import data_changes, is_compared

RESUMABLE_OPTIONS = frozenset(  # may differ between the run and its continuation
    (
        "output_dir",
        "checkpointing_steps",
        "resume_from_checkpoint",
        "config",
        "num_threads",
        "gradient_checkpointing",
        "offload_blocks",
        "validation_prompt",
        "num_validation_images",
        "num_inference_steps",
        "guidance_scale",
        "sample_batch_size",
        "extractor",
        "held_out",
        "max_held_out_samples",
        "validation_steps",
        "checkpoints_total_limit",
        "skip_nonfinite",
        "dry_run",
        "log_adapter_stats",
        "report_to",
        "logging_dir",
        "export_formats",
        "push_to_hub",
        "hub_model_id",
        "hub_private",
        "cache_dir",
        "cache_latents",
        "validation_data_dir",
        "class_prompt",  # the captions of class images, which come from it, are compared with the data
        "accept_changes",
        "overwrite_output_dir",
    )
)
DATA_OPTIONS = frozenset(  # where the data come from: the data themselves are compared
    (
        "instance_data_dir",
        "class_data_dir",
        "train_data_dir",
        "dataset_name",
        "dataset_config_name",
        "image_column",
        "caption_column",
        "label_column",
        "max_train_samples",
        "instance_captions",
        "num_class_images",
    )
)
PATH_OPTIONS = frozenset(
    ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "assistant_adapter")
)
STATE_OPTIONS = frozenset(  # the saved state has their form: with others it is another adapter or optimizer
    (
        "adapter",
        "rank",
        "alpha",
        "scale",
        "adapter_options",
        "param_budget",
        "targets",
        "train_text_encoder",
        "text_encoder_targets",
        "optimizer",
        "use_ema",
        "new_class_table",
    )
)


@dataclass(frozen=True)
class ResumeFacts:
    """The facts in which a run and its continuation must agree."""

    options: Mapping[str, object]
    data: Mapping[str, object]  # as `data_record` gives it
    processes: int


def check_resumable(before: ResumeFacts, now: ResumeFacts, checkpoint: Path) -> set[str]:
    """Compares the run that wrote a checkpoint with the run that resumes from it.

    Returns:
        The differences that `--accept_changes` allows: names of options, `data` and `processes`.

    Raises:
        ValueError: there are other differences, which the message lists with the way to accept them; or a
            name in `--accept_changes` is no option, or cannot be changed.
    """
    options = json.loads(json.dumps(now.options))  # tuples become lists, as in the checkpoint
    accepted = _accepted_names(options)
    changes = _option_changes(before, ResumeFacts(options, now.data, now.processes))
    if before.processes != now.processes:
        changes["processes"] = f"{before.processes} then, {now.processes} now"
    data_lines = data_changes(before.data, now.data)
    if data_lines:
        changes["data"] = "".join(f"\n    {line}" for line in data_lines)
    refused = [name for name in sorted(changes) if name not in accepted]
    if refused:
        remedy = ""
        if not STATE_OPTIONS.intersection(refused):
            remedy = f"; on purpose: --accept_changes {','.join([*sorted(accepted), *refused])}"
        lines = "\n".join(f"  {name}: {changes[name]}" for name in refused)
        raise ValueError(
            f"{checkpoint} belongs to a run with other options or data; repeat them or start anew"
            f"{remedy}:\n{lines}"
        )
    return set(changes)


def check_length(step: int, max_train_steps: int, checkpoint: Path) -> None:
    """Checks that a checkpoint lies within the run.

    Raises:
        ValueError: the checkpoint is behind the last step.
    """
    if step > max_train_steps:
        raise ValueError(
            f"{checkpoint} has made {step} steps, more than --max_train_steps {max_train_steps}; give "
            f"at least --max_train_steps {step}, or an earlier checkpoint"
        )


def _accepted_names(options: Mapping[str, object]) -> set[str]:
    """The names of `--accept_changes`."""
    possible = {*options, "data", "processes"} - STATE_OPTIONS
    accepted = set()
    for word in (options["accept_changes"] or "").split(","):
        name = word.strip().removeprefix("--")
        if name:
            accepted.add(name)
    for name in sorted(accepted):
        if name in STATE_OPTIONS:
            raise ValueError(f"--accept_changes {name}: it has another form of state; start anew")
        if name not in possible:
            raise ValueError(f"--accept_changes: no option {name!r}{did_you_mean(name, possible)}")
    return accepted


def _option_changes(before: ResumeFacts, now: ResumeFacts) -> dict[str, str]:
    """Options that differ although they matter: name -> both values."""
    ignored = set(RESUMABLE_OPTIONS)
    if now.options["lr_scheduler"] == "constant":  # the rate does not depend on the length of the run
        ignored.add("max_train_steps")
    if is_compared(before.data, now.data):
        ignored |= DATA_OPTIONS
    changes = {}
    for name, value in now.options.items():
        # an option that the checkpoint lacks is newer than it, and was not there to be chosen
        if name in ignored or name not in before.options or before.options[name] == value:
            continue
        if name in PATH_OPTIONS and _is_same_place(before.options[name], value):
            continue
        changes[name] = f"{before.options[name]!r} then, {value!r} now"
    return changes


def _is_same_place(first: object, second: object) -> bool:
    """Whether two names are paths to one existing file or folder."""
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    first_path = Path(first).expanduser()
    second_path = Path(second).expanduser()
    if not first_path.exists() or not second_path.exists():
        return False
    return first_path.resolve() == second_path.resolve()
