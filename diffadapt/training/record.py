"""What a run shows and leaves behind: a progress bar and log.jsonl while it goes, then run.json."""

import dataclasses
import json
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from diffadapt.training.loop import Step, Trainer

VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


class Log:
    """One JSON line per event. A resumed run goes on behind the step it resumes from."""

    def __init__(self, path: str | Path, *, resumed_step: int = 0, enabled: bool = True):
        self.path, self.enabled = Path(path), enabled
        if not enabled:
            return
        kept = [line for line in self._lines() if json.loads(line).get("step", 0) <= resumed_step]
        self.path.write_text("".join(kept) if resumed_step else "")

    def write(self, **event: object) -> None:
        if self.enabled:
            with self.path.open("a") as file:
                file.write(json.dumps(event) + "\n")

    def _lines(self) -> list[str]:
        """Complete lines: a killed run may leave half a line at the end."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


class Progress:
    """The progress bar and the log of one run, on the main process."""

    def __init__(self, trainer: Trainer):
        options, self.main = trainer.options, trainer.accelerator.is_main_process
        self.log = Log(Path(options.output_dir) / "log.jsonl", resumed_step=trainer.step, enabled=self.main)
        self.bar = tqdm(
            desc="steps", total=options.max_train_steps, initial=trainer.step, disable=not self.main
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, step: Step) -> None:
        values = dataclasses.asdict(step)
        self.log.write(step=values.pop("index"), **values)
        speed = f"{step.images / step.seconds:.1f} images/s"
        self.bar.set_postfix_str(f"loss {step.loss:.4f}, lr {step.lr:.2e}, {speed}", refresh=False)
        self.bar.update()

    def say(self, text: str) -> None:
        if self.main:
            self.bar.write(text)


def peak_memory_bytes() -> int:
    """The most memory this process held: of the GPU when there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_run(path: str | Path, values: dict[str, object]) -> None:
    """Writes run.json: the given values with the peak memory and the versions of everything that matters."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}
    content = {**values, "peak_memory_bytes": peak_memory_bytes(), "versions": versions}
    Path(path).write_text(json.dumps(content, indent=1, sort_keys=False) + "\n")
