"""The surroundings of a run: accelerator, precision, processor cores, quiet libraries."""

import logging
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin

from diffadapt.common.launcher import SET_BY_LAUNCHERS, launcher_sets_thread_count
from diffadapt.common.precision import DTYPES


def make_accelerator(
    *,
    mixed_precision: str,
    num_threads: int | None,
    trackers: Sequence[str] = (),
    logging_dir: str | None = None,
    timeout: timedelta | None = None,
) -> Accelerator:
    """An accelerator that uses the machine: on a CPU all idle cores, unless told otherwise.

    Args:
        timeout: how long processes wait for each other before the run is given up; None: torch's default.
    """
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        # The training loop accumulates; accelerate would divide by the launcher's number once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(trackers) or None,
        project_dir=logging_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)] if timeout is not None else None,
    )
    set_cpu_threads(num_threads, processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return accelerator


def expected_device() -> torch.device:
    """The device that `make_accelerator` will use, without an index."""
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type)


def launcher_accumulation() -> int:
    """Microsteps per optimizer step that the launcher exports; 1 where it exports none.

    Raises:
        ValueError: for what is no number of steps.
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


def set_cpu_threads(num_threads: int | None = None, *, processes: int = 1) -> None:
    """Set torch's threads: as asked for, else one per core that nobody uses.

    OpenMP's threads wait for each other at full load: two of them on a machine whose other core is busy take
    three to ten times as long for a step as one (measured on two cores; letting them sleep instead, by
    OMP_WAIT_POLICY, takes 2.5 times as long on an idle machine).

    Args:
        num_threads: `--num_threads`.
        processes: on this machine; they share the cores.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    elif not _threads_are_set():
        cores = available_cores()
        idle = cores / processes if processes > 1 else cores - busy_cores()
        torch.set_num_threads(max(1, int(idle + 0.5)))


def _threads_are_set() -> bool:
    """Whether a person set OMP_NUM_THREADS: launchers export 1 where nobody did."""
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        return False
    is_launched = any(name in os.environ for name in SET_BY_LAUNCHERS)
    if not is_launched or threads != "1":
        return True
    return launcher_sets_thread_count()


def busy_cores(seconds: float = 0.2) -> float:
    """Cores of those this process may use that other programs keep busy now; 0 where the system does not say.

    Args:
        seconds: how long to look, asleep.
    """
    before = _idle_and_total_ticks()
    time.sleep(seconds)
    after = _idle_and_total_ticks()
    busy = 0.0
    for core, (idle, total) in before.items():
        ticks = after[core][1] - total
        if ticks > 0:
            busy += 1 - (after[core][0] - idle) / ticks
    return busy


def _idle_and_total_ticks() -> dict[int, tuple[int, int]]:
    """Core -> time it was idle and time that passed, from /proc/stat (Linux); empty elsewhere."""
    try:
        text = Path("/proc/stat").read_text(encoding="utf-8")
    except OSError:
        return {}
    cores = usable_cores()
    ticks = {}
    for name, *numbers in map(str.split, text.splitlines()):
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cores:
            times = [int(number) for number in numbers[:8]]  # user nice system idle iowait irq softirq steal
            ticks[int(name[3:])] = (times[3] + times[4], sum(times))
    return ticks


def silence_libraries() -> None:
    """No loading bars and notices from the libraries; their warnings stay."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


def available_cores() -> int:
    """How many cores this process may use."""
    return len(usable_cores())


def usable_cores() -> set[int]:
    """The cores this process may use; where the system does not say, those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
