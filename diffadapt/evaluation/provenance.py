"""What a record says of the run that made it."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version

from accelerate import PartialState

LIBRARIES = (
    "diffadapt",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "torchmetrics",
    "torch-fidelity",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str]:
    """Of Python and of every library that a number can depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def run_facts(start: float) -> dict[str, object]:
    """Seconds since `start` (of `time.perf_counter`), this process's device, the number of processes."""
    state = PartialState()
    seconds = round(time.perf_counter() - start, 1)
    return {"seconds": seconds, "device": str(state.device), "processes": state.num_processes}
