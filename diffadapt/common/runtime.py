"""The environment of a run: accelerator, precision of the base, CPU threads, output of libraries."""

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
    """Creates the accelerator of a run and sets the number of CPU threads.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
        num_threads: see `set_cpu_threads`.
        trackers: names of accelerate's trackers.
        logging_dir: the folder they write to.
        timeout: the time processes wait for each other before the run fails; None for torch's default.
    """
    handlers = None
    if timeout is not None:
        handlers = [InitProcessGroupKwargs(timeout=timeout)]
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        # The training loop accumulates; accelerate would divide by the launcher's number once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(trackers) or None,
        project_dir=logging_dir,
        kwargs_handlers=handlers,
    )
    set_cpu_threads(num_threads, processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return accelerator


def expected_device() -> torch.device:
    """The type of device that `make_accelerator` will choose, without an index."""
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type)


def launcher_accumulation() -> int:
    """The gradient accumulation steps that the launcher sets; 1 if it sets none.

    Raises:
        ValueError: the environment variable is not a number of steps.
    """
    text = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if text == "auto":  # DeepSpeed's placeholder for "as in the script"
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS must be at least 1, got {text!r}")
    return int(text)


def weight_dtype(accelerator: Accelerator, requested: str | None = None) -> torch.dtype:
    """The dtype of the frozen base.

    Args:
        accelerator: the accelerator of the run.
        requested: "fp16", "bf16" or "fp32". None is the mixed precision on a GPU, and float32 on a CPU, where
            half precision costs accuracy and pays off for large bases only.
    """
    if requested is not None:
        return DTYPES.get(requested, torch.float32)
    if accelerator.device.type == "cpu":
        return torch.float32
    return DTYPES.get(accelerator.mixed_precision, torch.float32)


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """The dtype of activations in sampling; None without mixed precision."""
    return DTYPES.get(accelerator.mixed_precision)


def set_cpu_threads(num_threads: int | None = None, *, processes: int = 1) -> None:
    """Sets the number of torch's CPU threads; by default one for each idle core.

    OpenMP's threads wait for each other at full load. On two cores, one of them busy with another program,
    two threads take three to ten times as long for a step as one. With OMP_WAIT_POLICY=PASSIVE they wait
    asleep, but take 2.5 times as long on an idle machine.

    Args:
        num_threads: the value of `--num_threads`; None to choose. OMP_NUM_THREADS takes precedence over the
            choice, unless a launcher set it by itself.
        processes: the number of processes on this machine, which share its cores.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
        return
    if _threads_are_set():
        return
    cores = available_cores()
    # Processes of one run are busy themselves, so what they use is not measured but shared out.
    idle_cores = cores / processes if processes > 1 else cores - busy_cores()
    torch.set_num_threads(max(1, int(idle_cores + 0.5)))  # rounded: a core that is half idle counts


def _threads_are_set() -> bool:
    """Whether the user set OMP_NUM_THREADS; launchers set it to 1 if the user did not."""
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        return False
    is_launched = any(name in os.environ for name in SET_BY_LAUNCHERS)
    if not is_launched or threads != "1":
        return True
    return launcher_sets_thread_count()


def busy_cores(seconds: float = 0.2) -> float:
    """The number of usable cores that other programs keep busy; 0 if the system does not tell.

    Args:
        seconds: the time to measure over; this process sleeps meanwhile.
    """
    before = _idle_and_total_ticks()
    time.sleep(seconds)
    after = _idle_and_total_ticks()
    busy = 0.0
    for core, (idle_before, total_before) in before.items():
        idle_after, total_after = after[core]
        ticks = total_after - total_before
        if ticks > 0:
            busy += 1 - (idle_after - idle_before) / ticks
    return busy


def _idle_and_total_ticks() -> dict[int, tuple[int, int]]:
    """Core -> idle time and total time since boot, from /proc/stat (Linux); empty on other systems.

    A line is "cpu0 user nice system idle iowait irq softirq steal ...", see proc_stat(5).
    """
    try:
        text = Path("/proc/stat").read_text(encoding="utf-8")
    except OSError:
        return {}
    cores = usable_cores()
    ticks = {}
    for line in text.splitlines():
        name, *numbers = line.split()
        number = name.removeprefix("cpu")
        if not name.startswith("cpu") or not number.isdecimal() or int(number) not in cores:
            continue
        times = [int(value) for value in numbers[:8]]  # guest time behind them is part of user time
        _, _, _, idle, iowait, *_ = times
        ticks[int(number)] = (idle + iowait, sum(times))
    return ticks


def silence_libraries() -> None:
    """Turns off progress bars and info messages of diffusers, transformers and torch.distributed."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


def available_cores() -> int:
    """The number of cores this process may use."""
    return len(usable_cores())


def usable_cores() -> set[int]:
    """The cores this process may use; all cores of the machine if the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
