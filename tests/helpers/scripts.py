"""Training scripts run in the process of a test."""

import importlib.util
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from diffadapt.training.run import Run

FOLDER = Path(__file__).parents[2] / "train_scripts"


def runner(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that runs train_scripts/`name`.py with the given command line and returns its exit code."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    script = sys.modules[name]

    def run(*arguments: object) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return script.run_command(script.main)

    return run


def stop_after(index: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets runs in this process receive a signal while step `index` is logged."""
    log = Run.log

    def log_and_receive(training: Run, step: object) -> None:
        log(training, step)
        if step.index == index:
            signal.raise_signal(number)

    monkeypatch.setattr(Run, "log", log_and_receive)
