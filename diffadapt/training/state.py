"""Exact state of a run: safetensors and JSON in `checkpoint-N/`, nothing pickled.

Randomness is a function of the position: the state is the adapter, its average, the optimizer, the schedule
and the step. A checkpoint is written under a temporary name, synced and renamed: what is called checkpoint-N
is whole. Its adapter.safetensors is the file to use, made of the average when there is one.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import diffadapt as da
from diffadapt.adapter import Adapter
from diffadapt.files import sync
from diffadapt.models.names import is_embedded
from diffadapt.training.loop import Trainer
from diffadapt.training.packing import pack, unpack

FORMAT = 2
TOLD_OPTIONS = (  # recorded in the adapter's file
    "instance_prompt",
    "class_prompt",
    "learning_rate",
    "train_batch_size",
    "resolution",
    "seed",
    "mixed_precision",
)
SCHEDULE_FIELDS = ("last_epoch", "_step_count", "_last_lr")
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
    )
)


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
                shutil.rmtree(target)
            os.replace(unfinished, target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(_cannot_write(target, error)) from error
        sync(target.parent)
        _remove_old(Path(folder), trainer.options.checkpoints_total_limit, keep=target)
    return target


def _write(trainer: Trainer, unfinished: Path) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_adapter(trainer, unfinished)
    tensors: dict[str, torch.Tensor] = {}
    values = pack(_state(trainer), "state", tensors)
    save_file(tensors, unfinished / "state.safetensors")
    text = json.dumps({"format": FORMAT, "options": dataclasses.asdict(trainer.options), "state": values})
    (unfinished / "state.json").write_text(text)
    for path in [*unfinished.iterdir(), unfinished]:
        sync(path)


def _cannot_write(target: Path, error: Exception) -> str:
    present = [path for path in checkpoints(target.parent) if path != target]
    last = f"the last good one is {present[-1]}" if present else "there is none before it"
    return (
        f"cannot write {target} ({error}); {last}; make room, then repeat the command with "
        "--resume_from_checkpoint latest"
    )


def _remove_old(folder: Path, limit: int | None, *, keep: Path) -> None:
    """Removes the oldest checkpoints, by their number, beyond `limit`; never the one just written."""
    if limit is None:
        return
    others = [path for path in checkpoints(folder) if path != keep]
    for path in others[: max(0, len(others) + 1 - max(1, limit))]:
        doomed = path.with_name(f".removed-{path.name}")
        os.replace(path, doomed)  # a stop while it is removed leaves nothing that looks whole
        shutil.rmtree(doomed)


def checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints of a folder, the newest last."""
    present = sorted(Path(folder).glob("checkpoint-*"), key=_number)
    return [path for path in present if _number(path) >= 0 and (path / "state.json").is_file()]


def find(name: str, folder: str | Path) -> Path:
    """The checkpoint called `name`: 'latest' of `folder`, or a path, or a name inside `folder`.

    Raises: FileNotFoundError that lists the checkpoints there are.
    """
    present = checkpoints(folder)
    if name == "latest" and present:
        return present[-1]
    for path in (Path(name), Path(folder) / name):
        if name != "latest" and (path / "state.json").is_file():
            return path
    listed = ", ".join(path.name for path in present) or "none"
    raise FileNotFoundError(f"no checkpoint {name!r}; in {str(folder)!r} there are: {listed}")


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Puts a saved state into the trainer, in place.

    Raises: ValueError when the file is damaged or was written by a run with other options.
    """
    try:
        content = json.loads((checkpoint / "state.json").read_text())
        tensors = load_file(checkpoint / "state.safetensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{checkpoint} cannot be read ({error}); use an earlier checkpoint") from None
    if content.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} has format {content.get('format')}, this version reads {FORMAT}")
    _check_options(content["options"], dataclasses.asdict(trainer.options), checkpoint)
    state = unpack(content["state"], tensors)
    with torch.no_grad():
        for name, value in trainer.adapter.state_dict(keep_vars=True).items():
            value.copy_(state["adapter"][name])
    _restore_optimizer(trainer.optimizer, state["optimizer"])
    trainer.scheduler.__dict__.update(state["schedule"])
    if trainer.average is not None:
        trainer.average.restore(state["average"])
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.step, trainer.skipped = state["step"], state["skipped"]


def _state(trainer: Trainer) -> dict[str, object]:
    schedule, scaler = trainer.scheduler.state_dict(), trainer.accelerator.scaler
    return {
        "step": trainer.step,
        "skipped": trainer.skipped,
        "adapter": trainer.adapter.state_dict(),
        "average": None if trainer.average is None else trainer.average.state(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": {name: schedule[name] for name in SCHEDULE_FIELDS},
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, object]) -> None:
    """Groups and state as saved; torch casts floating state to the parameters' type, which is undone."""
    optimizer.load_state_dict(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        own = optimizer.state[parameters[index]]
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device)


def _check_options(before: dict[str, object], now: dict[str, object], checkpoint: Path) -> None:
    now = json.loads(json.dumps(now))
    free = FREE_OPTIONS | (
        {"max_train_steps"} if now["lr_scheduler"] == "constant" else set()
    )  # to go further
    differing = [k for k in sorted(now) if k not in free and k in before and before[k] != now[k]]
    if differing:
        listed = "\n".join(f"  {name}: {before[name]!r} then, {now[name]!r} now" for name in differing)
        raise ValueError(
            f"{checkpoint} belongs to a run with other options; repeat them or start anew:\n{listed}"
        )


def _number(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1
