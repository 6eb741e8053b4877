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
from diffadapt.training.checkpoint.checkpoint_files import checkpoints, find, run_of
from diffadapt.training.checkpoint.resume_options import Facts, check_continuation, check_length
from diffadapt.training.checkpoint.state_check import check_state, state_digest
from diffadapt.training.checkpoint.state_dict_json import pack, unpack
from diffadapt.training.loop import Trainer
from diffadapt.training.parsing import parse_pairs

__all__ = ["checkpoints", "find", "restore", "save", "save_adapter", "through_file"]

FORMAT = 3
MALFORMED = (AttributeError, LookupError, RecursionError, TypeError, ValueError)  # not what was written
TOLD_OPTIONS = (  # recorded in the adapter's file
    "instance_prompt",
    "class_prompt",
    "learning_rate",
    "train_batch_size",
    "resolution",
    "seed",
    "mixed_precision",
)
SETTINGS_OF = {  # option -> settings of the optimizer's groups that follow from it
    "learning_rate": ("initial_lr",),
    "text_encoder_lr": ("initial_lr",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_weight_decay": ("weight_decay",),
    "adam_epsilon": ("eps",),
}
SCHEDULE_FIELDS = ("last_epoch", "_step_count", "_last_lr")


def save_adapter(trainer: Trainer, folder: str | Path) -> Path:
    """Writes `folder`/adapter.safetensors: what is needed to use the result, and how it was trained.

    With `--use_ema` it holds the moving average.
    """
    options, path = trainer.options, Path(folder) / "adapter.safetensors"
    training = {name: str(getattr(options, name)) for name in TOLD_OPTIONS if hasattr(options, name)}
    demo = is_embedded(options.pretrained_model_name_or_path or "")
    metadata = {
        "steps": str(trainer.step),
        **training,
        "weights": f"moving average, decay {options.ema_decay:g}" if trainer.average else "of the last step",
        **trainer.notes,
        **({"note": "DEMO on the embedded base"} if demo else {}),
    }
    with trainer.average.in_place() if trainer.average else nullcontext():
        da.save(trainer.adapter, path, metadata=metadata, base=options.pretrained_model_name_or_path)
    return path


@contextmanager
def through_file(adapter: Adapter, pipe: object, path: Path) -> Iterator[Adapter]:
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


def save(trainer: Trainer, folder: str | Path) -> Path:
    """Writes `folder`/checkpoint-N from the main process and returns its path.

    Older ones beyond `--checkpoints_total_limit` are removed once it is complete.
    Raises: OSError when it cannot be written, naming the last checkpoint there is; that one is untouched.
    """
    target = Path(folder) / f"checkpoint-{trainer.step}"
    if trainer.accelerator.is_main_process:
        unfinished = target.with_name(f".unfinished-{target.name}")
        try:
            _write(trainer, unfinished)
            if target.exists():
                if run_of(target) not in (trainer.run, None):
                    raise OSError("it is there already and belongs to another run")
                _set_aside(target)
            os.replace(unfinished, target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(_cannot_write(target, error)) from error
        sync(target.parent)
        _remove_old(Path(folder), trainer, keep=target)
    return target


def _write(trainer: Trainer, unfinished: Path) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_adapter(trainer, unfinished)
    tensors: dict[str, torch.Tensor] = {}
    values = pack(_state(trainer), "state", tensors)
    save_file(tensors, unfinished / "state.safetensors")
    content = {
        "format": FORMAT,
        "run": trainer.run,
        "options": dataclasses.asdict(trainer.options),
        "data": dict(trainer.data),
        "processes": trainer.accelerator.num_processes,
        "state": values,
    }
    text = json.dumps({**content, "sha256": state_digest(content, tensors)})
    (unfinished / "state.json").write_text(text, encoding="utf-8")
    for path in [*unfinished.iterdir(), unfinished]:
        sync(path)


def _cannot_write(target: Path, error: Exception) -> str:
    present = [path for path in checkpoints(target.parent) if path != target]
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


def _remove_old(folder: Path, trainer: Trainer, *, keep: Path) -> None:
    """Removes the run's oldest checkpoints beyond the limit, and what killed processes left."""
    limit = trainer.options.checkpoints_total_limit
    others = [path for path in checkpoints(folder, run=trainer.run) if path != keep]
    for path in others[: len(others) + 1 - limit] if limit is not None and len(others) >= limit else ():
        _set_aside(path)
    for rest in (*folder.glob(".removed-checkpoint-*"), *folder.glob(".unfinished-checkpoint-*")):
        shutil.rmtree(rest)


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Puts a saved state into the trainer, in place.

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
        before = Facts(dict(content["options"]), dict(content["data"]), int(content["processes"]))
        run = str(content["run"])
        state = unpack(content["state"], tensors)
    except MALFORMED as error:
        raise ValueError(f"{checkpoint} is malformed ({error!r}); use an earlier checkpoint") from None
    now = Facts(dataclasses.asdict(trainer.options), dict(trainer.data), trainer.accelerator.num_processes)
    changed = check_continuation(before, now, checkpoint)
    try:
        check_state(state, _state(trainer))
    except MALFORMED as error:
        raise ValueError(f"{checkpoint} does not fit this run: {error}") from None
    check_length(state["step"], trainer.options.max_train_steps, checkpoint)
    current = [dict(group) for group in trainer.optimizer.param_groups]
    try:
        _restore_optimizer(trainer.optimizer, state["optimizer"])
    except MALFORMED as error:
        raise ValueError(f"{checkpoint} has no state of {trainer.options.optimizer} ({error!r})") from None
    with torch.no_grad():
        for name, value in trainer.adapter.state_dict(keep_vars=True).items():
            value.copy_(state["adapter"][name])
    trainer.scheduler.__dict__.update(state["schedule"])
    if changed:
        _use_changed_settings(trainer, current, changed)
    if trainer.average is not None:
        trainer.average.restore(state["average"])
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.step = state["step"]
    trainer.skipped = state["skipped"]
    trainer.position = _whole_steps(state["position"], trainer.batch_size)
    trainer.run = run


def _state(trainer: Trainer) -> dict[str, object]:
    schedule, scaler = trainer.scheduler.state_dict(), trainer.accelerator.scaler
    return {
        "step": trainer.step,
        "skipped": trainer.skipped,
        "position": trainer.position,
        "adapter": dict(trainer.adapter.state_dict()),
        "average": None if trainer.average is None else trainer.average.state(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": {name: schedule[name] for name in SCHEDULE_FIELDS},
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def _whole_steps(position: int, batch_size: int) -> int:
    """The position, or the next one that whole steps of this size reach: buckets fill whole steps."""
    return -(-position // batch_size) * batch_size


def _use_changed_settings(
    trainer: Trainer, current: Sequence[Mapping[str, object]], changed: Collection[str]
) -> None:
    """Puts the settings that `--accept_changes` names into the restored optimizer and schedule.

    Args:
        current: the optimizer's groups as this run's options made them.
        changed: options with another value than the checkpoint's.
    """
    names = {setting for option in changed for setting in SETTINGS_OF.get(option, ())}
    if "optimizer_options" in changed:
        names.update(parse_pairs(trainer.options.optimizer_options, "--optimizer_options"))
    for group, values in zip(trainer.optimizer.param_groups, current, strict=True):
        group.update({name: values[name] for name in names if name in values})
    scheduler = trainer.scheduler
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
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
