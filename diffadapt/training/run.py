"""A run around its loop: what is shown before, what may be done after a step, what is left at the end.

training = Run(trainer, batches, report)
for step in training.steps():
    training.log(step)
    training.validate(step)
    training.save(step)
return training.exit_code
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

import diffadapt as da
from diffadapt.data.batches import Batches
from diffadapt.evaluation.adapter_analysis import summary
from diffadapt.formats.export import write_formats
from diffadapt.training import output_folder
from diffadapt.training.checkpoint import state
from diffadapt.training.checkpoint.data_record import data_record
from diffadapt.training.encoder_offload import idle_parts, resting, woken
from diffadapt.training.loop import Step, Trainer, train
from diffadapt.training.output_folder import RESULTS
from diffadapt.training.push_to_hub import push
from diffadapt.training.report.base import Report
from diffadapt.training.report.summary import before_training
from diffadapt.training.run_log import Progress
from diffadapt.training.sharding import gathered
from diffadapt.training.signals import StopRequest
from diffadapt.training.trackers import Trackers

HOW_TO_GO_ON = "stopped; to go on: the same command with --resume_from_checkpoint latest"


class Run:
    """One run from the summary to the closing words, on every process.

    Attributes:
        exit_code: 0, or 128 + the signal that stopped the run.
    """

    def __init__(self, trainer: Trainer, batches: Batches, report: Report):
        self.trainer, self.batches, self.report = trainer, batches, report
        self.options, self.accelerator = trainer.options, trainer.accelerator
        self.denoiser = report.model.denoiser
        self._restore()
        self.idle = idle_parts(report.model, batches)
        self.trackers: Trackers | None = None  # opened before the first images
        self.exit_code = 0

    def steps(self) -> Iterator[Step]:
        """Summary and first pictures, then the steps of the run; at its end, what the run leaves.

        With `--dry_run` the summary is all. The caller logs, validates and saves after every step.
        """
        try:
            yield from self._steps()
        finally:
            if self.trackers is not None:
                for failure in self.trackers.close():
                    print(f"warning: {failure}", file=sys.stderr)
            self.accelerator.end_training()  # closes the connection of the processes

    def _steps(self) -> Iterator[Step]:
        with gathered(self.denoiser):
            if self.accelerator.is_main_process:
                self.report.rehearse(self.trainer)
            self.accelerator.wait_for_everyone()
        rows = {**self.report.told(), **self.report.cut_prompts()}
        if self.report.export_note is not None:
            rows["export"] = self.report.export_note
        described = before_training(self.trainer, self.batches, self.report.model.pipe, rows)
        if self.accelerator.is_main_process:
            print(described)
        if self.options.dry_run:
            return
        with gathered(self.denoiser):
            if self.accelerator.is_main_process:
                is_resumed = self.options.resume_from_checkpoint is not None
                output_folder.prepare(self.options, self.trainer.run, is_resumed=is_resumed)
            self.trackers = Trackers(
                self.accelerator, dataclasses.asdict(self.options), step=self.trainer.step
            )
            if self.accelerator.is_main_process:
                with self.report.untrained():
                    self.report.begin()
            self.accelerator.wait_for_everyone()
        is_main = self.accelerator.is_main_process
        rest = resting(self.idle, self.accelerator.device)
        self.progress = Progress(self.trainer, self.trackers)
        with StopRequest(announce=is_main) as stop, self.progress, rest:
            for step in train(self.trainer, self.batches):
                signal = stop.agreed(self.accelerator)
                self.exit_code = 128 + signal if signal else 0
                yield step
                if signal:
                    self.progress.say(HOW_TO_GO_ON)
                    return
        self.trackers.close()
        self.report.failures += self.trackers.failures
        self._finish()

    def _restore(self) -> None:
        """Records the data, and puts the checkpoint of `--resume_from_checkpoint` into the trainer."""
        batches, trainer = self.batches, self.trainer
        classes = json.loads(trainer.notes["classes"]) if "classes" in trainer.notes else None
        trainer.data = data_record(batches.order, classes, is_streamed=batches.is_streaming)
        if self.options.resume_from_checkpoint:
            checkpoint = state.find(self.options.resume_from_checkpoint, self.options.output_dir)
            state.restore(trainer, checkpoint)

    def log(self, step: Step) -> None:
        """The progress bar, log.jsonl and the trackers; when it is time, figures of the adapter too."""
        every = self.options.log_adapter_stats
        is_due = every and step.index % every == 0
        with gathered(self.denoiser) if is_due else nullcontext():
            self.progress.show(step, summary(self.trainer.adapter) if is_due else {})

    def save(self, step: Step) -> None:
        """A checkpoint when it is due, when the run is about to stop, and after the last step."""
        every = self.options.checkpointing_steps
        is_last = step.index == self.options.max_train_steps
        is_due = every > 0 and step.index % every == 0
        if self.exit_code or is_last or is_due:
            state.save(self.trainer, self.options.output_dir)

    def validate(self, step: Step) -> None:
        """Pictures through a saved file, when it is time."""
        every = self.options.validation_steps
        if not every or step.index % every or self.exit_code or not self.report.validation_shots():
            return
        with woken(self.idle, self.accelerator.device), gathered(self.denoiser):
            if self.accelerator.is_main_process:
                folder = Path(self.options.output_dir) / "validation" / f"step-{step.index}"
                earlier = len(self.report.failures)
                with self.report.attempt(f"validation at step {step.index}"):
                    path = state.save_adapter(self.trainer, folder)
                    with state.through_file(self.trainer.adapter, self.report.model.pipe, path):
                        pictures = self.report.validate(folder)
                    self.progress.track_pictures("validation", pictures, step.index)
                for failure in self.report.failures[earlier:]:
                    self.progress.say(failure)
            self.accelerator.wait_for_everyone()

    def _finish(self) -> None:
        """The adapter's file, the pictures and figures made through it, and the exported files."""
        with gathered(self.denoiser):
            if self.accelerator.is_main_process:
                output_folder.remove(Path(self.options.output_dir), RESULTS)
                path = state.save_adapter(self.trainer, self.options.output_dir)
                try:
                    self._show(path)
                except KeyboardInterrupt:
                    tqdm.write(self._saved("stopped"), file=sys.stderr)
                    raise
            self.accelerator.wait_for_everyone()

    def _show(self, path: Path) -> None:
        """The exports of the saved adapter, then images and figures made with it, then the upload."""
        report = self.report
        da.detach(self.trainer.adapter)
        adapter = da.load(report.model.pipe, path)  # as `diffadapt sample` does
        report.write_record(adapter, {})
        lines = []
        with report.attempt("export"):
            lines = write_formats(adapter, path, self.options.export_formats)
        print(report.finish(adapter))
        for line in lines:
            print(line)
        if self.options.push_to_hub:
            with report.attempt("upload"):
                print(f"uploaded: {push(self.options)}")
        if report.failures:
            self.exit_code = 1
            failures = "".join(f"\n  {failure}" for failure in report.failures)
            print(self._saved(f"error: not everything succeeded:{failures}\n"), file=sys.stderr)

    def _saved(self, what: str) -> str:
        """What happened, where the result is, and how to repeat the end of the run."""
        output = self.options.output_dir
        return (
            f"{what}; the adapter is saved: {output}/adapter.safetensors, and {output}/run.json; to repeat "
            "the end of the run: the same command with --resume_from_checkpoint latest"
        )
