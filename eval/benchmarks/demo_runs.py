"""Runs of the training scripts' demonstrations for the tables of docs/; finished runs are not repeated."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "train_scripts"


def run(script: str, output: Path, options: Mapping[str, object], extra_words: Sequence[str] = ()) -> dict:
    """The record (run.json) of a demonstration, which is run unless `output` holds a finished one.

    Args:
        script: name of a training script.
        output: folder of the run.
        options: option -> value.
        extra_words: further words of the command line.

    Raises:
        RuntimeError: the script failed; with the end of its error output.
    """
    run_file = output / "run.json"
    if not run_file.exists():
        command = [sys.executable, str(SCRIPTS / script)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        command += ["--output_dir", str(output), *extra_words]
        print(" ".join(command), file=sys.stderr, flush=True)
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr[-2000:]}")
    return json.loads(run_file.read_text(encoding="utf-8"))


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean and, of several values, standard deviation; empty for none."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
