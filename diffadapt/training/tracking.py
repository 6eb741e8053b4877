"""Trackers: tensorboard, wandb and the others that accelerate knows, chosen by name, checked at the start."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch import Tensor

from diffadapt.nearest import near

# What is imported and what is installed; a name that is not here is imported and installed under itself.
PACKAGES = {"comet_ml": ("comet_ml", "comet-ml"), "dvclive": ("dvclive", "dvclive")}

PROJECT = "diffadapt"


def check_trackers(text: str) -> list[str]:
    """The trackers of `--report_to`.

    Raises: ValueError for an unknown one, or one that is not installed, naming what to install.
    """
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"unknown tracker {name!r} in --report_to{near(name, LOGGER_TYPE_TO_CLASS)}")
        module, package = PACKAGES.get(name, (name, name))
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"--report_to {name} needs a package: pip install {package}")
    return names


def start_trackers(accelerator: Accelerator, options: Mapping[str, object], *, step: int) -> None:
    """Opens the trackers of a run that stands at `step`; what tensorboard holds of later steps is hidden.

    Tensorboard and wandb write to the accelerator's logging folder, trackio to its own (TRACKIO_DIR).
    Raises: ValueError when one cannot be opened, as without a login.
    """
    config = {name: value for name, value in options.items() if value is not None}
    own: dict[str, dict[str, object]] = {"tensorboard": {"purge_step": step + 1}}
    if "wandb" in map(str, accelerator.log_with):
        Path(accelerator.logging_dir).mkdir(parents=True, exist_ok=True)  # wandb would write elsewhere
        own["wandb"] = {"dir": accelerator.logging_dir}
    try:
        accelerator.init_trackers(PROJECT, config, init_kwargs=own)
    except Exception as error:  # every library has its own kinds
        raise ValueError(
            f"a tracker of --report_to cannot be opened: {error}; log in to it, leave it out, or let wandb "
            "write here only: WANDB_MODE=offline"
        ) from error


def track_pictures(accelerator: Accelerator, name: str, images: Tensor, step: int) -> None:
    """Hands pictures (N, 3, H, W) in [0, 1] to tensorboard, wandb and trackio; others get figures only."""
    values = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: values}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: values}, step=step)
        elif tracker.name == "trackio":
            from trackio import Image

            tracker.log({f"{name}/{i}": Image(value) for i, value in enumerate(values)}, step=step)
