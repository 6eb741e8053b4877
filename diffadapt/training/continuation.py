"""Which options of a run may change when it goes on from a checkpoint."""

import json
from pathlib import Path

FREE_OPTIONS = frozenset(  # may differ between the run and its continuation
    (
        "output_dir",
        "checkpointing_steps",
        "resume_from_checkpoint",
        "config",
        "num_threads",
        "gradient_checkpointing",
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
    )
)


def check_options(before: dict[str, object], now: dict[str, object], checkpoint: Path) -> None:
    """Raises: ValueError that lists the options which differ although they must not."""
    now = json.loads(json.dumps(now))
    can_go_further = now["lr_scheduler"] == "constant"  # the rate does not depend on the length
    free = FREE_OPTIONS | ({"max_train_steps"} if can_go_further else set())
    differing = [k for k in sorted(now) if k not in free and k in before and before[k] != now[k]]
    if differing:
        listed = "\n".join(f"  {name}: {before[name]!r} then, {now[name]!r} now" for name in differing)
        raise ValueError(
            f"{checkpoint} belongs to a run with other options; repeat them or start anew:\n{listed}"
        )
