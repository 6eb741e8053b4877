"""Ends a process whose launcher died: `accelerate launch` does not hand SIGTERM on to what it started."""

import os
import signal
import threading
import time
from pathlib import Path

SET_BY_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed", b"torch/distributed")
SECONDS_BETWEEN_LOOKS = 0.5


def launcher_pid() -> int | None:
    """The parent process, when it is `accelerate launch` or torchrun; None for a shell and for Windows.

    A shell may end while what it started goes on (`nohup`, a closed terminal multiplexer).
    """
    if os.name == "nt" or not any(name in os.environ for name in SET_BY_LAUNCHERS):
        return None
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:  # macOS has no /proc: the environment decides
        return parent
    if any(name in command for name in LAUNCHERS):
        return parent
    return None


LAUNCHER = launcher_pid()  # asked for before the slow imports: it may die while they last


def end_with_launcher() -> None:
    """Sends this process SIGTERM once its launcher is gone: training then saves a checkpoint and ends."""
    if LAUNCHER is not None:
        threading.Thread(target=_watch, args=(LAUNCHER,), name="launcher watch", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
