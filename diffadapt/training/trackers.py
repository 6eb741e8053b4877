"""Experiment trackers: tensorboard, wandb and others of accelerate, by name, tried before the first step."""

import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from torch import Tensor

from diffadapt.common.messages import did_you_mean

# Module and package of trackers that are not imported and installed by their own name.
PACKAGES = {"comet_ml": ("comet_ml", "comet-ml"), "dvclive": ("dvclive", "dvclive")}

PROJECT = "diffadapt"


def check_trackers(text: str) -> list[str]:
    """Parses `--report_to` into names of trackers.

    Raises:
        ValueError: a tracker is unknown, or not installed; the message names the package to install.
    """
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"unknown tracker {name!r} in --report_to{did_you_mean(name, LOGGER_TYPE_TO_CLASS)}"
            )
        module, package = PACKAGES.get(name, (name, name))
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"--report_to {name} needs a package: pip install {package}")
    return names


def start_trackers(accelerator: Accelerator, options: Mapping[str, object], *, step: int) -> None:
    """Opens the trackers of a run.

    Tensorboard and wandb write to the accelerator's logging folder, trackio to its own (TRACKIO_DIR).

    Args:
        step: the step at which the run stands; what tensorboard holds of later steps is hidden.

    Raises:
        ValueError: one cannot be opened, as without a login.
    """
    config = {name: value for name, value in options.items() if value is not None}
    arguments: dict[str, dict[str, object]] = {"tensorboard": {"purge_step": step + 1}}
    if "wandb" in map(str, accelerator.log_with):
        Path(accelerator.logging_dir).mkdir(parents=True, exist_ok=True)  # wandb would write elsewhere
        arguments["wandb"] = {"dir": accelerator.logging_dir}
    try:
        accelerator.init_trackers(PROJECT, config, init_kwargs=arguments)
    except Exception as error:  # every library has its own kinds
        raise ValueError(_cannot_open_message(error)) from error


def _cannot_open_message(error: Exception) -> str:
    return (
        f"a tracker of --report_to cannot be opened: {error}; log in to it, leave it out, or let wandb "
        "write here only: WANDB_MODE=offline"
    )


def try_trackers(names: Sequence[str]) -> None:
    """Tries of trackers what needs no open run: writing events, and the key to log in with.

    Raises:
        ValueError: one could not be opened later.
    """
    for name, trial in TRIALS.items():
        if name not in names:
            continue
        try:
            trial()
        except Exception as error:  # every library has its own kinds
            raise ValueError(_cannot_open_message(error)) from error


def _try_tensorboard() -> None:
    from torch.utils.tensorboard import SummaryWriter

    with TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        writer.add_scalar("trial", 0.0, 1)


def _try_wandb() -> None:
    """Raises a ValueError where wandb would send values and has no key to log in with."""
    import wandb

    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    if "prompt" in inspect.signature(wandb.login).parameters:
        has_key = wandb.login(prompt=False)
    else:  # before 0.31
        has_key = wandb.api.api_key is not None
    if not has_key:
        raise ValueError("wandb has no key to log in with")


TRIALS = {"tensorboard": _try_tensorboard, "wandb": _try_wandb}


class Trackers:
    """The open trackers of a run.

    One that fails is left out from there on; the run goes on.

    Attributes:
        failures: a line for each tracker that failed.
    """

    def __init__(self, accelerator: Accelerator, options: Mapping[str, object], *, step: int):
        self._accelerator = accelerator
        self.failures: list[str] = []
        start_trackers(accelerator, options, step=step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs values of a step."""
        for tracker in list(self._accelerator.trackers):
            with self._attempt(tracker, f"step {step}"):
                tracker.log(dict(values), step=step)

    def log_images(self, name: str, images: Tensor, step: int) -> None:
        """Logs images, which tensorboard, wandb and trackio take.

        Args:
            images: (N, 3, H, W) in [0, 1].
        """
        values = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
        for tracker in list(self._accelerator.trackers):
            with self._attempt(tracker, f"images of step {step}"):
                _log_images(tracker, name, values, step)

    def close(self) -> list[str]:
        """Ends the runs of the trackers; a second time there is nothing to end.

        Returns:
            What failed in it, also in `failures`.
        """
        earlier_failures = len(self.failures)
        trackers = list(self._accelerator.trackers)
        self._accelerator.trackers.clear()
        for tracker in trackers:
            with self._attempt(tracker, "the end"):
                tracker.finish()
        return self.failures[earlier_failures:]

    @contextmanager
    def _attempt(self, tracker: GeneralTracker, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every library has its own kinds
            self.failures.append(f"tracker {tracker.name}, {what}: {str(error) or type(error).__name__}")
            if tracker in self._accelerator.trackers:
                self._accelerator.trackers.remove(tracker)


def _log_images(tracker: GeneralTracker, name: str, values: numpy.ndarray, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({name: values}, step=step, dataformats="NHWC")
    elif tracker.name == "wandb":
        tracker.log_images({name: values}, step=step)
    elif tracker.name == "trackio":
        from trackio import Image

        images = {}
        for index, value in enumerate(values):
            images[f"{name}/{index}"] = Image(value)
        tracker.log(images, step=step)
