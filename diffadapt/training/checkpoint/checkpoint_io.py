"""Exact state of a run: safetensors and JSON in `checkpoint-N/`, nothing pickled.

Randomness is a function of the position: the state is the adapter, its average, the optimizer, the schedule
and the step. A checkpoint is written under a temporary name, synced and renamed: what is called checkpoint-N
is whole. Its adapter.safetensors is the file to use, made of the average when there is one.
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
from diffadapt.models.base_names import is_embedded
from diffadapt.training.checkpoint.checkpoint_files import list_checkpoints, run_id_of
from diffadapt.training.checkpoint.resume_options import ResumeFacts, check_length, check_resumable
from diffadapt.training.checkpoint.state_check import check_state, state_digest
from diffadapt.training.checkpoint.state_dict_json import pack, unpack
from diffadapt.training.loop import TrainState
from diffadapt.training.parsing import parse_pairs

FORMAT = 3
MALFORMED = (AttributeError, LookupError, RecursionError, TypeError, ValueError)  # not what was written
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


def save_adapter(train_state: TrainState, folder: str | Path) -> Path:
    """Writes `folder`/adapter.safetensors: what is needed to use the result, and how it was trained.

    With `--use_ema` it holds the moving average.
    """
    options, path = train_state.options, Path(folder) / "adapter.safetensors"
    training = {name: str(getattr(options, name)) for name in METADATA_OPTIONS if hasattr(options, name)}
    weights = "of the last step"
    if train_state.average is not None:
        weights = f"moving average, decay {options.ema_decay:g}"
    demo = is_embedded(options.pretrained_model_name_or_path or "")
    metadata = {
        "steps": str(train_state.step),
        **training,
        "weights": weights,
        **train_state.metadata,
        **({"note": "DEMO on the embedded base"} if demo else {}),
    }
    with train_state.average.in_place() if train_state.average else nullcontext():
        da.save(train_state.adapter, path, metadata=metadata, base=options.pretrained_model_name_or_path)
    return path


@contextmanager
def reloaded_from_file(adapter: Adapter, pipe: object, path: Path) -> Iterator[Adapter]:
    """Within the context the model works with the adapter of a file instead of the one that is trained."""
    strength, adapter.strength = adapter.strength, 0.0
    try:
        loaded = da.load(pipe, path, name="validation")
        try:
            yield loaded
        finally:
            da.detach(loaded)
    finally:
        adapter.strength = strength


def save_checkpoint(train_state: TrainState, folder: str | Path) -> Path:
    """Writes `folder`/checkpoint-N from the main process and returns its path.

    Older ones beyond `--checkpoints_total_limit` are removed once it is complete.
    Raises: OSError when it cannot be written, naming the last checkpoint there is; that one is untouched.
    """
    target = Path(folder) / f"checkpoint-{train_state.step}"
    if train_state.accelerator.is_main_process:
        unfinished = target.with_name(f".unfinished-{target.name}")
        try:
            _write(train_state, unfinished)
            if target.exists():
                if run_id_of(target) not in (train_state.run_id, None):
                    raise OSError("it is there already and belongs to another run")
                _set_aside(target)
            os.replace(unfinished, target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(_cannot_write(target, error)) from error
        sync(target.parent)
        _remove_old(Path(folder), train_state, keep=target)
    return target


def _write(train_state: TrainState, unfinished: Path) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_adapter(train_state, unfinished)
    tensors: dict[str, torch.Tensor] = {}
    values = pack(_state(train_state), "state", tensors)
    save_file(tensors, unfinished / "state.safetensors")
    content = {
        "format": FORMAT,
        "run": train_state.run_id,
        "options": dataclasses.asdict(train_state.options),
        "data": dict(train_state.data),
        "processes": train_state.accelerator.num_processes,
        "state": values,
    }
    text = json.dumps({**content, "sha256": state_digest(content, tensors)})
    (unfinished / "state.json").write_text(text, encoding="utf-8")
    for path in [*unfinished.iterdir(), unfinished]:
        sync(path)


def _cannot_write(target: Path, error: Exception) -> str:
    present = [path for path in list_checkpoints(target.parent) if path != target]
    last = f"the last good one is {present[-1]}" if present else "there is none before it"
    return (
        f"cannot write {target} ({error}); {last}; make room, then repeat the command with "
        "--resume_from_checkpoint latest"
    )


def _set_aside(path: Path) -> None:
    """Takes a checkpoint's name away before it is removed: half removed it must not be found."""
    aside = path.with_name(f".removed-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)


def _remove_old(folder: Path, train_state: TrainState, *, keep: Path) -> None:
    """Removes the run's oldest checkpoints beyond the limit, and what killed processes left."""
    limit = train_state.options.checkpoints_total_limit
    others = [path for path in list_checkpoints(folder, run=train_state.run_id) if path != keep]
    for path in others[: len(others) + 1 - limit] if limit is not None and len(others) >= limit else ():
        _set_aside(path)
    for rest in (*folder.glob(".removed-checkpoint-*"), *folder.glob(".unfinished-checkpoint-*")):
        shutil.rmtree(rest)


def restore_checkpoint(train_state: TrainState, checkpoint: Path) -> None:
    """Puts a saved state into the train_state, in place.

    Raises: ValueError when the file is damaged, was written by a run with other options or data (unless
        `--accept_changes` names them), or stands behind the end of this run.
    """
    try:
        content = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / "state.safetensors")
        version, sha256 = content["format"], content.pop("sha256", None)
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise ValueError(f"{checkpoint} cannot be read ({error!r}); use an earlier checkpoint") from None
    if version != FORMAT:
        raise ValueError(f"{checkpoint} has format {version!r}, this version reads {FORMAT}")
    if sha256 != state_digest(content, tensors):
        raise ValueError(f"{checkpoint} was altered or damaged; use an earlier checkpoint")
    try:
        before = ResumeFacts(dict(content["options"]), dict(content["data"]), int(content["processes"]))
        run = str(content["run"])
        state = unpack(content["state"], tensors)
    except MALFORMED as error:
        raise ValueError(f"{checkpoint} is malformed ({error!r}); use an earlier checkpoint") from None
    now = ResumeFacts(
        dataclasses.asdict(train_state.options), dict(train_state.data), train_state.accelerator.num_processes
    )
    changed = check_resumable(before, now, checkpoint)
    try:
        check_state(state, _state(train_state))
    except MALFORMED as error:
        raise ValueError(f"{checkpoint} does not fit this run: {error}") from None
    check_length(state["step"], train_state.options.max_train_steps, checkpoint)
    current = [dict(group) for group in train_state.optimizer.param_groups]
    try:
        _restore_optimizer(train_state.optimizer, state["optimizer"])
    except MALFORMED as error:
        raise ValueError(
            f"{checkpoint} has no state of {train_state.options.optimizer} ({error!r})"
        ) from None
    with torch.no_grad():
        for name, value in train_state.adapter.state_dict(keep_vars=True).items():
            value.copy_(state["adapter"][name])
    train_state.scheduler.__dict__.update(state["schedule"])
    if changed:
        _use_changed_settings(train_state, current, changed)
    if train_state.average is not None:
        train_state.average.restore(state["average"])
    if train_state.accelerator.scaler is not None:
        train_state.accelerator.scaler.load_state_dict(state["scaler"])
    train_state.step = state["step"]
    train_state.skipped = state["skipped"]
    train_state.position = _whole_steps(state["position"], train_state.batch_size)
    train_state.run_id = run


def _state(train_state: TrainState) -> dict[str, object]:
    schedule, scaler = train_state.scheduler.state_dict(), train_state.accelerator.scaler
    return {
        "step": train_state.step,
        "skipped": train_state.skipped,
        "position": train_state.position,
        "adapter": dict(train_state.adapter.state_dict()),
        "average": None if train_state.average is None else train_state.average.state(),
        "optimizer": train_state.optimizer.state_dict(),
        "schedule": {name: schedule[name] for name in SCHEDULE_FIELDS},
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def _whole_steps(position: int, batch_size: int) -> int:
    """The position, or the next one that whole steps of this size reach: buckets fill whole steps."""
    return -(-position // batch_size) * batch_size


def _use_changed_settings(
    train_state: TrainState, current: Sequence[Mapping[str, object]], changed: Collection[str]
) -> None:
    """Puts the settings that `--accept_changes` names into the restored optimizer and schedule.

    Args:
        current: the optimizer's groups as this run's options made them.
        changed: options with another value than the checkpoint's.
    """
    names = {setting for option in changed for setting in OPTIMIZER_SETTINGS.get(option, ())}
    if "optimizer_options" in changed:
        names.update(parse_pairs(train_state.options.optimizer_options, "--optimizer_options"))
    for group, values in zip(train_state.optimizer.param_groups, current, strict=True):
        group.update({name: values[name] for name in names if name in values})
    scheduler = train_state.scheduler
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(train_state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, object]) -> None:
    """Groups and state as saved; torch casts floating state to the parameters' type, which is undone.

    Raises: KeyError, TypeError or ValueError of an optimizer that misses values; it is then as before.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds torch's
    before = {"state": inner.state, "param_groups": inner.param_groups}
    try:
        optimizer.load_state_dict(state)
    except Exception:
        inner.__dict__.update(before)
        raise
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        own = optimizer.state[parameters[index]]
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device)
