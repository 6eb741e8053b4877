"""Ends a process whose launcher died: `accelerate launch` does not hand SIGTERM on to what it started."""

import os
import signal
import threading
import time
from pathlib import Path

SET_BY_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed", b"torch/distributed")
SECONDS_BETWEEN_LOOKS = 0.5
PROCESSES = Path("/proc")


def launcher_pid() -> int | None:
    """The parent process, when it is `accelerate launch` or torchrun; None for a shell and for Windows.

    A shell may end while what it started goes on (`nohup`, a closed terminal multiplexer).
    """
    if os.name == "nt" or not any(name in os.environ for name in SET_BY_LAUNCHERS):
        return None
    parent = os.getppid()
    try:
        command = (PROCESSES / str(parent) / "cmdline").read_bytes()
    except OSError:  # macOS has no /proc: the environment decides
        return parent
    if any(name in command for name in LAUNCHERS):
        return parent
    return None


LAUNCHER = launcher_pid()  # asked for before the slow imports: it may die while they last


def launcher_sets_thread_count() -> bool:
    """Whether OMP_NUM_THREADS or --num_cpu_threads_per_process was given to the launcher; False if unknown.

    A launcher exports OMP_NUM_THREADS=1 to what it starts where nobody gave it (Linux alone tells).
    """
    if LAUNCHER is None:
        return False
    try:
        environment = (PROCESSES / str(LAUNCHER) / "environ").read_bytes()
        command = (PROCESSES / str(LAUNCHER) / "cmdline").read_bytes()
    except OSError:
        return False
    is_exported = any(entry.startswith(b"OMP_NUM_THREADS=") for entry in environment.split(b"\0"))
    return is_exported or b"--num_cpu_threads_per_process" in command


def end_with_launcher() -> None:
    """Sends this process SIGTERM once its launcher is gone: training then saves a checkpoint and ends."""
    if LAUNCHER is not None:
        threading.Thread(target=_watch, args=(LAUNCHER,), name="launcher watch", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
