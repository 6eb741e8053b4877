"""A run around its loop: what is shown before, what may be done after a step, what is left at the end.

training = Run(train_state, batches, report)
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
from diffadapt.training.checkpoint import checkpoint_io
from diffadapt.training.checkpoint.checkpoint_files import find_checkpoint
from diffadapt.training.checkpoint.data_record import data_record
from diffadapt.training.encoder_offload import idle_parts, resting, woken
from diffadapt.training.loop import Step, TrainState, train
from diffadapt.training.output_folder import RESULTS
from diffadapt.training.push_to_hub import push
from diffadapt.training.report.base import Report
from diffadapt.training.report.summary import summary_text
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

    def __init__(self, train_state: TrainState, batches: Batches, report: Report):
        self.train_state, self.batches, self.report = train_state, batches, report
        self.options, self.accelerator = train_state.options, train_state.accelerator
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
                self.report.try_outputs(self.train_state)
            self.accelerator.wait_for_everyone()
        rows = {**self.report.summary_rows(), **self.report.truncated_prompts()}
        if self.report.export_note is not None:
            rows["export"] = self.report.export_note
        described = summary_text(self.train_state, self.batches, self.report.model.pipe, rows)
        if self.accelerator.is_main_process:
            print(described)
        if self.options.dry_run:
            return
        with gathered(self.denoiser):
            if self.accelerator.is_main_process:
                is_resumed = self.options.resume_from_checkpoint is not None
                output_folder.initialize(self.options, self.train_state.run_id, is_resumed=is_resumed)
            self.trackers = Trackers(
                self.accelerator, dataclasses.asdict(self.options), step=self.train_state.step
            )
            if self.accelerator.is_main_process:
                with self.report.base_model():
                    self.report.before_training()
            self.accelerator.wait_for_everyone()
        is_main = self.accelerator.is_main_process
        rest = resting(self.idle, self.accelerator.device)
        self.progress = Progress(self.train_state, self.trackers)
        with StopRequest(announce=is_main) as stop, self.progress, rest:
            for step in train(self.train_state, self.batches):
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
        """Records the data, and puts the checkpoint of `--resume_from_checkpoint` into the train_state."""
        batches, train_state = self.batches, self.train_state
        classes = json.loads(train_state.metadata["classes"]) if "classes" in train_state.metadata else None
        train_state.data = data_record(batches.order, classes, is_streamed=batches.is_streaming)
        if self.options.resume_from_checkpoint:
            checkpoint = find_checkpoint(self.options.resume_from_checkpoint, self.options.output_dir)
            checkpoint_io.restore_checkpoint(train_state, checkpoint)

    def log(self, step: Step) -> None:
        """The progress bar, log.jsonl and the trackers; when it is time, figures of the adapter too."""
        every = self.options.log_adapter_stats
        is_due = every and step.index % every == 0
        with gathered(self.denoiser) if is_due else nullcontext():
            self.progress.show(step, summary(self.train_state.adapter) if is_due else {})

    def save(self, step: Step) -> None:
        """A checkpoint when it is due, when the run is about to stop, and after the last step."""
        every = self.options.checkpointing_steps
        is_last = step.index == self.options.max_train_steps
        is_due = every > 0 and step.index % every == 0
        if self.exit_code or is_last or is_due:
            checkpoint_io.save_checkpoint(self.train_state, self.options.output_dir)

    def validate(self, step: Step) -> None:
        """Pictures through a saved file, when it is time."""
        every = self.options.validation_steps
        if not every or step.index % every or self.exit_code or not self.report.validation_requests():
            return
        with woken(self.idle, self.accelerator.device), gathered(self.denoiser):
            if self.accelerator.is_main_process:
                folder = Path(self.options.output_dir) / "validation" / f"step-{step.index}"
                earlier = len(self.report.failures)
                with self.report.attempt(f"validation at step {step.index}"):
                    path = checkpoint_io.save_adapter(self.train_state, folder)
                    with checkpoint_io.reloaded_from_file(
                        self.train_state.adapter, self.report.model.pipe, path
                    ):
                        pictures = self.report.validate(folder)
                    self.progress.log_images("validation", pictures, step.index)
                for failure in self.report.failures[earlier:]:
                    self.progress.say(failure)
            self.accelerator.wait_for_everyone()

    def _finish(self) -> None:
        """The adapter's file, the pictures and figures made through it, and the exported files."""
        with gathered(self.denoiser):
            if self.accelerator.is_main_process:
                output_folder.remove(Path(self.options.output_dir), RESULTS)
                path = checkpoint_io.save_adapter(self.train_state, self.options.output_dir)
                try:
                    self._show(path)
                except KeyboardInterrupt:
                    tqdm.write(self._saved("stopped"), file=sys.stderr)
                    raise
            self.accelerator.wait_for_everyone()

    def _show(self, path: Path) -> None:
        """The exports of the saved adapter, then images and figures made with it, then the upload."""
        report = self.report
        da.detach(self.train_state.adapter)
        adapter = da.load(report.model.pipe, path)  # as `diffadapt sample` does
        report.write_record(adapter, {})
        lines = []
        with report.attempt("export"):
            lines = write_formats(adapter, path, self.options.export_formats)
        print(report.after_training(adapter))
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
