"""What a run shows and leaves behind: a progress bar and log.jsonl while it goes, then run.json."""

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

VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


class Log:
    """One JSON line per event. A resumed run goes on behind the step it resumes from."""

    def __init__(self, path: str | Path, *, resumed_step: int = 0, enabled: bool = True):
        self.path, self.enabled = Path(path), enabled
        if not enabled:
            return
        kept = [line for line in self._lines() if json.loads(line).get("step", 0) <= resumed_step]
        text = "".join(kept) if resumed_step else ""
        write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, **event: object) -> None:
        """Values that are not finite numbers, as the loss of a step that was left out, become null.

        Raises: OSError with the remedy when it cannot be written.
        """
        if self.enabled:
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()
            }
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(finite) + "\n")
            except OSError as error:
                raise OSError(
                    f"cannot write {self.path} ({error}); make room, then repeat the command with "
                    "--resume_from_checkpoint latest"
                ) from error

    def _lines(self) -> list[str]:
        """Complete lines: a killed run may leave half a line at the end."""
        if not self.path.exists():
            return []
        return [
            line
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("}\n")
        ]


class Progress:
    """The progress bar, the log and the trackers of one run."""

    def __init__(self, train_state: TrainState, trackers: Trackers):
        options, self.trackers = train_state.options, trackers
        self.main = train_state.accelerator.is_main_process
        self.log = Log(
            Path(options.output_dir) / "log.jsonl", resumed_step=train_state.step, enabled=self.main
        )
        self._said = 0  # failures of trackers
        self.bar = tqdm(
            desc="steps", total=options.max_train_steps, initial=train_state.step, disable=not self.main
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, step: Step, figures: Mapping[str, float]) -> None:
        """One step and further figures of it: in the bar, as a line of the log, and to the trackers."""
        values = {**dataclasses.asdict(step), **figures}
        values = {name: value for name, value in values.items() if name != "index" and value is not None}
        self.log.write(step=step.index, **values)
        if self.main:
            self.trackers.log({name: float(value) for name, value in values.items()}, step.index)
            self._say_failures()
        speed = step.images / step.seconds
        shown = f"loss {step.loss:.4f}, lr {step.lr:.2e}, {speed:.1f} images/s"
        memory = peak_memory_bytes()
        if memory is not None:
            shown += f", {memory / 2**30:.1f} GiB"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()

    def log_images(self, name: str, images: Tensor, step: int) -> None:
        """Pictures (N, 3, H, W) in [0, 1] to the trackers."""
        self.trackers.log_images(name, images, step)
        self._say_failures()

    def _say_failures(self) -> None:
        """Each tracker that failed, once."""
        for failure in self.trackers.failures[self._said :]:
            self.say(f"{failure}; the run goes on without it")
        self._said = len(self.trackers.failures)

    def say(self, text: str) -> None:
        if self.main:
            self.bar.write(text)


def peak_memory_bytes() -> int | None:
    """The most memory this process held: of the GPU when there is one, else of the machine.

    None on a CPU where the system does not count it (Windows).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_run(path: str | Path, values: dict[str, object]) -> None:
    """Writes run.json: the given values with the peak memory and the versions of everything that matters."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}
    content = dict(values)
    memory = peak_memory_bytes()
    if memory is not None:
        content["peak_memory_bytes"] = memory
    content["versions"] = versions
    text = to_json(content)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
