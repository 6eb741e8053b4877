"""Ends a process whose launcher died, since `accelerate launch` does not forward SIGTERM to its children."""

import os
import signal
import threading
import time
from pathlib import Path

SET_BY_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # environment variables
LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed", b"torch/distributed")
POLL_SECONDS = 0.5
PROCESSES = Path("/proc")


def launcher_pid() -> int | None:
    """The process id of the parent if it is `accelerate launch` or torchrun; None for a shell and on Windows.

    A shell does not count: it may end while its commands go on (`nohup`, a closed terminal multiplexer).
    """
    is_launched = any(name in os.environ for name in SET_BY_LAUNCHERS)
    if os.name == "nt" or not is_launched:
        return None
    parent = os.getppid()
    try:
        command = (PROCESSES / str(parent) / "cmdline").read_bytes()
    except OSError:  # macOS has no /proc, so the environment decides
        return parent
    if any(name in command for name in LAUNCHERS):
        return parent
    return None


LAUNCHER = launcher_pid()  # looked up before the slow imports, during which the launcher may die


def launcher_sets_thread_count() -> bool:
    """Whether OMP_NUM_THREADS or --num_cpu_threads_per_process was given to the launcher; False if unknown.

    A launcher sets OMP_NUM_THREADS=1 for its children if nobody gave it; only Linux tells the cases apart.
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
    """Sends SIGTERM to this process once its launcher is gone; training then saves a checkpoint and ends."""
    if LAUNCHER is not None:
        threading.Thread(target=_watch, args=(LAUNCHER,), name="launcher watch", daemon=True).start()


def _watch(launcher: int) -> None:
    """Waits until the parent of this process is another one, which is the case once the launcher died."""
    while os.getppid() == launcher:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
