"""Exact state of a run: safetensors and JSON in `checkpoint-N/`, nothing pickled.

Randomness is a function of the position: the state is the adapter, the optimizer, the schedule and the step.
A checkpoint is written under a temporary name, synced and renamed: what is called checkpoint-N is whole.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import diffadapt as da
from diffadapt.adapter import Adapter
from diffadapt.models.names import is_embedded
from diffadapt.training.loop import Trainer

FORMAT = 1
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
    )
)


def save_adapter(trainer: Trainer, folder: str | Path) -> Path:
    """Writes `folder`/adapter.safetensors: what is needed to use the result, and how it was trained."""
    options, path = trainer.options, Path(folder) / "adapter.safetensors"
    training = {name: str(getattr(options, name)) for name in TOLD_OPTIONS if hasattr(options, name)}
    demo = is_embedded(options.pretrained_model_name_or_path or "")
    metadata = {
        "steps": str(trainer.step),
        **training,
        **({"note": "DEMO on the embedded base"} if demo else {}),
    }
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
    """Writes `folder`/checkpoint-N from the main process and returns its path."""
    target = Path(folder) / f"checkpoint-{trainer.step}"
    if trainer.accelerator.is_main_process:
        _write(trainer, target)
    return target


def _write(trainer: Trainer, target: Path) -> None:
    unfinished = target.with_name(f".unfinished-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_adapter(trainer, unfinished)
    save_file(_tensors(trainer), unfinished / "state.safetensors")
    (unfinished / "state.json").write_text(json.dumps(_values(trainer), indent=1))
    for path in [*unfinished.iterdir(), unfinished]:
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    os.replace(unfinished, target)
    _sync(target.parent)


def find(name: str, folder: str | Path) -> Path:
    """The checkpoint called `name`: 'latest' of `folder`, or a path, or a name inside `folder`.

    Raises: FileNotFoundError that lists the checkpoints there are.
    """
    present = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: _number(path))
    present = [path for path in present if _number(path) >= 0 and (path / "state.json").is_file()]
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
        values = json.loads((checkpoint / "state.json").read_text())
        tensors = load_file(checkpoint / "state.safetensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{checkpoint} cannot be read ({error}); use an earlier checkpoint") from None
    if values.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} has format {values.get('format')}, this version reads {FORMAT}")
    _check_options(values["options"], dataclasses.asdict(trainer.options), checkpoint)
    with torch.no_grad():
        for name, value in trainer.adapter.state_dict(keep_vars=True).items():
            value.copy_(tensors[f"adapter.{name}"])
    _restore_optimizer(trainer.optimizer, tensors, values["rates"])
    trainer.scheduler.__dict__.update(values["schedule"])
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(values["scaler"])
    trainer.step = values["step"]


def _tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = {f"adapter.{k}": v for k, v in trainer.adapter.state_dict().items()}
    for index, state in _optimizer_state(trainer.optimizer).items():
        tensors.update({f"optimizer.{index}.{key}": value for key, value in state.items()})
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _values(trainer: Trainer) -> dict[str, object]:
    schedule = trainer.scheduler.state_dict()
    scaler = trainer.accelerator.scaler
    return {
        "format": FORMAT,
        "step": trainer.step,
        "rates": [group["lr"] for group in trainer.optimizer.param_groups],
        "schedule": {name: schedule[name] for name in SCHEDULE_FIELDS},
        "scaler": None if scaler is None else scaler.state_dict(),
        "options": dataclasses.asdict(trainer.options),
    }


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, torch.Tensor]]:
    return optimizer.state_dict()["state"]


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], rates: list[float]
) -> None:
    state = optimizer.state_dict()
    state["state"] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part == "optimizer":
            index, key = rest.split(".", 1)
            state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
