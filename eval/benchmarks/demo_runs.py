"""Runs of the training scripts' demonstrations for the tables of docs/, each made once."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "train_scripts"


def run(script: str, output: Path, options: Mapping[str, object], further: Sequence[str] = ()) -> dict:
    """The record (run.json) of a demonstration, which is made unless ``output`` holds a finished one.

    Raises: RuntimeError with the end of what the script said when it fails.
    """
    if not (output / "run.json").exists():
        given = [f"{part}" for name, value in options.items() for part in (f"--{name}", value)]
        command = [sys.executable, str(SCRIPTS / script), *given, "--output_dir", str(output), *further]
        print(" ".join(command), file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean and, of several values, standard deviation; empty for none."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
