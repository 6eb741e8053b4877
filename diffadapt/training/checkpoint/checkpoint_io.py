"""Saving a run exactly and restoring it: safetensors and JSON in `checkpoint-N/`, nothing pickled.

Randomness is a function of the position: the state is the adapter, its average, the optimizer, the schedule
and the step. A checkpoint is written under a temporary name, synced and renamed: what is called checkpoint-N
is complete. Its adapter.safetensors is the file to use, made of the average when there is one.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import diffadapt as da
from diffadapt.adapters.adapter import Adapter
from diffadapt.common.atomic_files import sync
from diffadapt.training.checkpoint.checkpoint_files import list_checkpoints, run_id_of
from diffadapt.training.checkpoint.resume_options import ResumeFacts, check_length, check_resumable
from diffadapt.training.checkpoint.state_check import check_state, state_digest
from diffadapt.training.checkpoint.state_dict_json import pack, unpack
from diffadapt.training.loop import TrainState
from diffadapt.training.parsing import parse_pairs

FORMAT = 3
# What Python raises for a value that another program, or an accident, wrote in place of ours.
MALFORMED = (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError)
METADATA_OPTIONS = (  # recorded in the adapter's file
    "instance_prompt",
    "class_prompt",
    "learning_rate",
    "train_batch_size",
    "resolution",
    "seed",
    "mixed_precision",
)
OPTIMIZER_SETTINGS = {  # option -> settings of the optimizer's groups that follow from it
    "learning_rate": ("initial_lr",),
    "text_encoder_lr": ("initial_lr",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_weight_decay": ("weight_decay",),
    "adam_epsilon": ("eps",),
}
SCHEDULE_FIELDS = ("last_epoch", "_step_count", "_last_lr")


# The adapter's file


def save_adapter(train_state: TrainState, folder: str | Path) -> Path:
    """Writes `folder`/adapter.safetensors: what is needed to use the result, and how it was trained.

    With `--use_ema` it holds the moving average.
    """
    options = train_state.options
    metadata = {"steps": str(train_state.step)}
    for name in METADATA_OPTIONS:
        if hasattr(options, name):
            metadata[name] = str(getattr(options, name))
    metadata["weights"] = "of the last step"
    if train_state.average is not None:
        metadata["weights"] = f"moving average, decay {options.ema_decay:g}"
    metadata |= train_state.metadata
    if options.is_demo:
        metadata["note"] = "DEMO on the embedded base"
    path = Path(folder) / "adapter.safetensors"
    with train_state.average.in_place() if train_state.average else nullcontext():
        da.save(train_state.adapter, path, metadata=metadata, base=options.pretrained_model_name_or_path)
    return path


@contextmanager
def reloaded_from_file(pipe: object, path: Path) -> Iterator[Adapter]:
    """Within the context the model works with the adapter of a file instead of those that are attached."""
    # Switched off and not detached: the optimizer holds the tensors of the one that is trained.
    with da.disabled(pipe):
        loaded = da.load(pipe, path, name="validation")
        try:
            yield loaded
        finally:
            da.detach(loaded)


# Saving


def save_checkpoint(train_state: TrainState, folder: str | Path) -> Path:
    """Writes `folder`/checkpoint-N from the main process; older ones beyond the limit are then removed.

    Returns:
        The path of the checkpoint, on every process.

    Raises:
        OSError: it cannot be written; the message names the last checkpoint there is, which is untouched.
    """
    target = Path(folder) / f"checkpoint-{train_state.step}"
    if not train_state.accelerator.is_main_process:
        return target
    unfinished = target.with_name(f".unfinished-{target.name}")
    try:
        _write(train_state, unfinished)
        if target.exists():
            if run_id_of(target) not in (train_state.run_id, None):
                raise OSError("it is there already and belongs to another run")
            _rename_before_removal(target)  # os.replace needs an empty folder, or none
        os.replace(unfinished, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(_write_error_message(target, error)) from error
    sync(target.parent)  # the rename itself, before anything older is removed
    _remove_old_checkpoints(Path(folder), train_state, newest=target)
    return target


def _state(train_state: TrainState) -> dict[str, object]:
    """Everything that the next step depends on, apart from options and data."""
    average = train_state.average
    scaler = train_state.accelerator.scaler
    schedule = train_state.scheduler.state_dict()
    return {
        "step": train_state.step,
        "skipped": train_state.skipped,
        "position": train_state.position,
        "adapter": dict(train_state.adapter.state_dict()),
        "average": None if average is None else average.state(),
        "optimizer": train_state.optimizer.state_dict(),
        "schedule": {name: schedule[name] for name in SCHEDULE_FIELDS},
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def _write(train_state: TrainState, folder: Path) -> None:
    """Writes and syncs the three files of a checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_adapter(train_state, folder)
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(_state(train_state), "state", tensors)
    save_file(tensors, folder / "state.safetensors")
    content = {
        "format": FORMAT,
        "run": train_state.run_id,
        "options": dataclasses.asdict(train_state.options),
        "data": dict(train_state.data),
        "processes": train_state.accelerator.num_processes,
        "state": packed,
    }
    # state.json comes last: without it a folder is no checkpoint.
    text = json.dumps({**content, "sha256": state_digest(content, tensors)})
    (folder / "state.json").write_text(text, encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        sync(path)


def _write_error_message(target: Path, error: Exception) -> str:
    checkpoints = [path for path in list_checkpoints(target.parent) if path != target]
    last = f"the last good one is {checkpoints[-1]}" if checkpoints else "there is none before it"
    return (
        f"cannot write {target} ({error}); {last}; make room, then repeat the command with "
        "--resume_from_checkpoint latest"
    )


def _rename_before_removal(path: Path) -> None:
    """Takes a checkpoint's name away: one that is half removed must not be found."""
    renamed = path.with_name(f".removed-{path.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(path, renamed)


def _remove_old_checkpoints(folder: Path, train_state: TrainState, *, newest: Path) -> None:
    """Removes the run's oldest checkpoints beyond the limit, and what killed processes left."""
    limit = train_state.options.checkpoints_total_limit
    if limit is not None:
        older = [path for path in list_checkpoints(folder, run_id=train_state.run_id) if path != newest]
        excess = max(0, len(older) + 1 - limit)
        for path in older[:excess]:
            _rename_before_removal(path)
    for pattern in (".removed-checkpoint-*", ".unfinished-checkpoint-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


# Restoring


def restore_checkpoint(train_state: TrainState, checkpoint: Path) -> None:
    """Puts a saved state into the run, in place.

    Raises:
        ValueError: the file is damaged, was written by a run with other options or data (unless
            `--accept_changes` names them), or stands behind the end of this run.
    """
    options = train_state.options
    content, tensors = _read(checkpoint)
    try:
        before = ResumeFacts(dict(content["options"]), dict(content["data"]), int(content["processes"]))
        run_id = str(content["run"])
        saved = unpack(content["state"], tensors)
    except MALFORMED as error:
        raise ValueError(f"{checkpoint} is malformed ({error!r}); use an earlier checkpoint") from None
    processes = train_state.accelerator.num_processes
    now = ResumeFacts(dataclasses.asdict(options), dict(train_state.data), processes)
    changed_options = check_resumable(before, now, checkpoint)
    try:
        check_state(saved, _state(train_state))
    except MALFORMED as error:
        raise ValueError(f"{checkpoint} does not fit this run: {error}") from None
    check_length(saved["step"], options.max_train_steps, checkpoint)

    # as this run's options say; loading the state replaces them
    new_groups = [dict(group) for group in train_state.optimizer.param_groups]
    try:
        _restore_optimizer(train_state.optimizer, saved["optimizer"])
    except MALFORMED as error:
        raise ValueError(f"{checkpoint} has no state of {options.optimizer} ({error!r})") from None
    # From here on nothing fails: a run is restored as a whole, or unchanged.
    with torch.no_grad():
        for name, value in train_state.adapter.state_dict(keep_vars=True).items():
            value.copy_(saved["adapter"][name])
    train_state.scheduler.__dict__.update(saved["schedule"])
    if changed_options:
        _apply_changed_options(train_state, new_groups, changed_options)
    if train_state.average is not None:
        train_state.average.restore(saved["average"])
    if train_state.accelerator.scaler is not None:
        train_state.accelerator.scaler.load_state_dict(saved["scaler"])
    train_state.step = saved["step"]
    train_state.skipped = saved["skipped"]
    train_state.position = _round_up(saved["position"], train_state.batch_size)
    train_state.run_id = run_id


def _read(checkpoint: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """The JSON and the tensors of a checkpoint, as they were written.

    Raises:
        ValueError: a file cannot be read, was altered, or has another format.
    """
    try:
        content = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / "state.safetensors")
        version = content["format"]
        sha256 = content.pop("sha256", None)
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise ValueError(f"{checkpoint} cannot be read ({error!r}); use an earlier checkpoint") from None
    if version != FORMAT:
        raise ValueError(f"{checkpoint} has format {version!r}, this version reads {FORMAT}")
    if sha256 != state_digest(content, tensors):
        raise ValueError(f"{checkpoint} was altered or damaged; use an earlier checkpoint")
    return content, tensors


def _round_up(position: int, batch_size: int) -> int:
    """The position, or the next one that whole steps of this size reach: buckets fill whole steps."""
    return -(-position // batch_size) * batch_size


def _apply_changed_options(
    train_state: TrainState, new_groups: Sequence[Mapping[str, object]], changed_options: Collection[str]
) -> None:
    """Puts the settings that `--accept_changes` names into the restored optimizer and schedule.

    Args:
        new_groups: the optimizer's groups as this run's options made them.
        changed_options: options with another value than the checkpoint's.
    """
    settings: set[str] = set()
    for option in changed_options:
        settings.update(OPTIMIZER_SETTINGS.get(option, ()))
    if "optimizer_options" in changed_options:
        settings.update(parse_pairs(train_state.options.optimizer_options, "--optimizer_options"))
    # The scheduler's base rates are this run's; its position is the checkpoint's.
    scheduler = train_state.scheduler
    rates = []
    for base_rate, factor_at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        rates.append(base_rate * factor_at(scheduler.last_epoch))
    for group, new_group, rate in zip(train_state.optimizer.param_groups, new_groups, rates, strict=True):
        for name in settings.intersection(new_group):
            group[name] = new_group[name]
        group["lr"] = rate
    scheduler._last_lr = rates


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, object]) -> None:
    """Restores groups and state as saved; torch casts floats to the parameters' type, which is undone.

    Raises:
        KeyError, TypeError, ValueError: the optimizer misses values; it is then as before.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds torch's
    before = {"state": inner.state, "param_groups": inner.param_groups}
    try:
        optimizer.load_state_dict(saved)
    except Exception:
        inner.__dict__.update(before)
        raise
    parameters = []  # numbered as torch's state_dict numbers them: through all groups
    for group in optimizer.param_groups:
        parameters += group["params"]
    for index, saved_values in saved["state"].items():
        values = optimizer.state[parameters[index]]
        for name, value in saved_values.items():
            if isinstance(value, torch.Tensor) and values[name].dtype != value.dtype:
                values[name] = value.to(values[name].device)
