"""The surroundings of a run: accelerator, precision, processor cores, quiet libraries."""

import logging
import os
from collections.abc import Sequence
from datetime import timedelta

import diffusers
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin

from diffadapt.precision import DTYPES


def start(
    *,
    mixed_precision: str,
    num_threads: int | None,
    trackers: Sequence[str] = (),
    logging_dir: str | None = None,
    patience: timedelta | None = None,
) -> Accelerator:
    """An accelerator that uses the machine: on a CPU all available cores, unless told otherwise.

    Args:
        patience: how long processes wait for each other before the run is given up; None: torch's default.
    """
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        # The training loop accumulates; accelerate would divide by the launcher's number once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(trackers) or None,
        project_dir=logging_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)] if patience is not None else None,
    )
    use_cores(num_threads, processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return accelerator


def expected_device() -> torch.device:
    """The device that `start` will use, without an index."""
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type)


def launcher_accumulation() -> int:
    """Microsteps per optimizer step that the launcher exports; 1 where it exports none.

    Raises: ValueError for what is no number of steps.
    """
    text = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if text == "auto":
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS must be at least 1, got {text!r}")
    return int(text)


def weight_dtype(accelerator: Accelerator, wish: str | None = None) -> torch.dtype:
    """Precision of the frozen base: as wished, else half with mixed precision on a GPU. On a CPU half costs
    digits, and pays only for bases of real size."""
    if wish is not None:
        return DTYPES.get(wish, torch.float32)
    if accelerator.device.type == "cpu":
        return torch.float32
    return DTYPES.get(accelerator.mixed_precision, torch.float32)


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Precision of activations when drawing; None without mixed precision."""
    return DTYPES.get(accelerator.mixed_precision)


def use_cores(num_threads: int | None = None, *, processes: int = 1) -> None:
    """Sets torch's threads. `accelerate launch` exports OMP_NUM_THREADS=1 by itself: nobody's wish."""
    wish = os.environ.get("OMP_NUM_THREADS")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    elif wish is None or (launched and wish == "1"):
        torch.set_num_threads(max(1, available_cores() // processes))


def quiet() -> None:
    """No loading bars and notices from the libraries; their warnings stay."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


def available_cores() -> int:
    """Cores this process may use; where the system does not say, those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
