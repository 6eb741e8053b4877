"""The record of a run: a progress bar and log.jsonl while it trains, run.json at its end."""

import dataclasses
import json
import math
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffadapt.common.atomic_files import write_atomically
from diffadapt.common.strict_json import to_json
from diffadapt.training.loop import Step, TrainState
from diffadapt.training.trackers import Trackers

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

RECORDED_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


class Log:
    """A file with one JSON line per event. A resumed run goes on behind the step it resumes from."""

    def __init__(self, path: str | Path, *, resumed_step: int = 0, enabled: bool = True):
        self.path = Path(path)
        self.enabled = enabled
        if not enabled:
            return
        text = ""
        if resumed_step:
            text = "".join(self._lines_until(resumed_step))
        write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, **event: object) -> None:
        """Appends a line. Values that are not finite, as the loss of a skipped step, become null.

        Raises:
            OSError: it cannot be written; the message has the remedy.
        """
        if not self.enabled:
            return
        values = {}
        for name, value in event.items():
            # JSON has no NaN and no infinity, and strict readers refuse Python's words for them
            is_nonfinite = isinstance(value, float) and not math.isfinite(value)
            values[name] = None if is_nonfinite else value
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise OSError(
                f"cannot write {self.path} ({error}); make room, then repeat the command with "
                "--resume_from_checkpoint latest"
            ) from error

    def _lines_until(self, step: int) -> list[str]:
        """The lines of earlier steps and of this one."""
        if not self.path.exists():
            return []
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            is_complete = line.endswith("}\n")  # a killed run may leave half a line at the end
            if is_complete and json.loads(line).get("step", 0) <= step:
                lines.append(line)
        return lines


class Progress:
    """The progress bar, the log and the trackers of one run; a context that closes the bar."""

    def __init__(self, train_state: TrainState, trackers: Trackers):
        options = train_state.options
        self.trackers = trackers
        self.is_main = train_state.accelerator.is_main_process
        path = Path(options.output_dir) / "log.jsonl"
        self.log = Log(path, resumed_step=train_state.step, enabled=self.is_main)
        self.bar = tqdm(
            desc="steps", total=options.max_train_steps, initial=train_state.step, disable=not self.is_main
        )
        self._reported_failures = 0  # of trackers

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, step: Step, statistics: Mapping[str, float]) -> None:
        """Writes one step to the bar, the log and the trackers.

        Args:
            statistics: more values of this step, for the log and the trackers.
        """
        values = {}
        for name, value in {**dataclasses.asdict(step), **statistics}.items():
            if name != "index" and value is not None:
                values[name] = value
        self.log.write(step=step.index, **values)
        if self.is_main:
            self.trackers.log({name: float(value) for name, value in values.items()}, step.index)
            self._say_failures()
        speed = step.images / step.seconds
        status = f"loss {step.loss:.4f}, lr {step.lr:.2e}, {speed:.1f} images/s"
        memory = peak_memory_bytes()
        if memory is not None:
            status += f", {memory / 2**30:.1f} GiB"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update()

    def log_images(self, name: str, images: Tensor, step: int) -> None:
        """Hands images (N, 3, H, W) in [0, 1] to the trackers."""
        self.trackers.log_images(name, images, step)
        self._say_failures()

    def say(self, text: str) -> None:
        """Prints a line above the bar, on the main process."""
        if self.is_main:
            self.bar.write(text)

    def _say_failures(self) -> None:
        """Reports each tracker that failed, once."""
        for failure in self.trackers.failures[self._reported_failures :]:
            self.say(f"{failure}; the run goes on without it")
        self._reported_failures = len(self.trackers.failures)


def peak_memory_bytes() -> int | None:
    """The most memory this process held: of the GPU when there is one, else of the machine.

    None on a CPU where the system does not count it (Windows).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_run(path: str | Path, values: dict[str, object]) -> None:
    """Writes run.json: the given values with the peak memory and the versions of the packages used."""
    content = dict(values)
    memory = peak_memory_bytes()
    if memory is not None:
        content["peak_memory_bytes"] = memory
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        versions[name] = version(name)
    content["versions"] = versions
    text = to_json(content)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
