"""A run around its training loop: the summary before it, validation and checkpoints in it, results after it.

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
from diffadapt.training.encoder_offload import unused_components
from diffadapt.training.loop import Step, TrainState, train
from diffadapt.training.output_folder import RESULTS
from diffadapt.training.push_to_hub import push
from diffadapt.training.report.base import Report
from diffadapt.training.report.summary import summary_text
from diffadapt.training.run_log import Progress
from diffadapt.training.sharding import gathered
from diffadapt.training.signals import StopRequest
from diffadapt.training.trackers import Trackers

STOPPED = "stopped; to go on: the same command with --resume_from_checkpoint latest"


class Run:
    """One run from the summary to the closing message, on every process.

    Only the main process writes files and generates images; the others wait for it, because their next step
    needs it.

    Attributes:
        exit_code: 0, 1 when something beside the adapter failed, or 128 + the signal that stopped the run.
    """

    def __init__(self, train_state: TrainState, batches: Batches, report: Report):
        self.train_state = train_state
        self.batches = batches
        self.report = report
        self.options = train_state.options
        self.accelerator = train_state.accelerator
        self.denoiser = report.model.denoiser
        self.placement = report.model.placement
        self.unused_components = unused_components(report.model, batches)
        self.placement.to_device(report.model.pipe.components.keys() - set(self.unused_components))
        if report.model.samples_from_states and batches.are_captions_encoded:
            report.prompt_states = batches.encoded_captions.rows
        self.trackers: Trackers | None = None  # opened before the first images
        self.exit_code = 0
        self._restore()

    def steps(self) -> Iterator[Step]:
        """Runs everything and yields each step, after which the caller logs, validates and saves.

        With `--dry_run` the summary is all.
        """
        try:
            yield from self._steps()
        finally:
            # Also after an error: an open run of wandb would wait for more.
            if self.trackers is not None:
                for failure in self.trackers.close():
                    print(f"warning: {failure}", file=sys.stderr)
            self.accelerator.end_training()  # closes the connection of the processes

    def log(self, step: Step) -> None:
        """Writes a step to the progress bar, log.jsonl and the trackers, with due adapter statistics."""
        if not _is_due(step, self.options.log_adapter_stats):
            self.progress.show(step, {})
            return
        with gathered(self.denoiser):
            self.progress.show(step, summary(self.train_state.adapter))

    def validate(self, step: Step) -> None:
        """Generates images from a saved adapter file, when they are due."""
        if not _is_due(step, self.options.validation_steps) or self.exit_code:
            return
        if not self.report.validation_requests():
            return
        with self.placement.on_device(self.unused_components), gathered(self.denoiser):
            if self.accelerator.is_main_process:
                self._generate_validation_images(step)
            self.accelerator.wait_for_everyone()

    def save(self, step: Step) -> None:
        """Saves a checkpoint when it is due, when the run is about to stop, and after the last step."""
        is_last = step.index == self.options.max_train_steps
        if self.exit_code or is_last or _is_due(step, self.options.checkpointing_steps):
            checkpoint_io.save_checkpoint(self.train_state, self.options.output_dir)

    def _restore(self) -> None:
        """Records the data, and restores the checkpoint of `--resume_from_checkpoint`."""
        train_state = self.train_state
        classes = None
        if "classes" in train_state.metadata:
            classes = json.loads(train_state.metadata["classes"])
        train_state.data = data_record(self.batches.order, classes, is_streamed=self.batches.is_streaming)
        name = self.options.resume_from_checkpoint
        if name:
            checkpoint_io.restore_checkpoint(train_state, find_checkpoint(name, self.options.output_dir))

    def _steps(self) -> Iterator[Step]:
        self._print_summary()
        if self.options.dry_run:
            return
        self._start_output()
        self.progress = Progress(self.train_state, self.trackers)
        stop_request = StopRequest(announce=self.accelerator.is_main_process)
        with stop_request, self.progress:
            for step in train(self.train_state, self.batches):
                signal = stop_request.agreed(self.accelerator)
                self.exit_code = 128 + signal if signal else 0
                yield step  # the script saves: `save` sees the exit code
                if signal:
                    self.progress.say(STOPPED)
                    return
        self.trackers.close()
        self.report.failures += self.trackers.failures
        self._finish()

    def _print_summary(self) -> None:
        """Tries what the end of the run needs, then prints what will be trained, on what, for how long."""
        with gathered(self.denoiser):
            if self.accelerator.is_main_process:
                self.report.try_outputs(self.train_state)
            self.accelerator.wait_for_everyone()
        rows = {**self.report.summary_rows(), **self.report.truncated_prompts()}
        if self.report.export_note is not None:
            rows["export"] = self.report.export_note
        if not self.report.model.has_weights:
            rows["untried"] = (
                "the adapter's file and its exports, for which a dry run of this base loads no weights"
            )
        # On every process: it measures the memory of a forward pass, for which a sharded base needs all.
        text = summary_text(self.train_state, self.batches, self.report.model, rows)
        if self.accelerator.is_main_process:
            print(text)

    def _start_output(self) -> None:
        """Takes the output folder, opens the trackers, and generates the images of the untrained base."""
        is_resumed = self.options.resume_from_checkpoint is not None
        with self.placement.on_device(self.unused_components), gathered(self.denoiser):
            if self.accelerator.is_main_process:
                output_folder.initialize(self.options, self.train_state.run_id, is_resumed=is_resumed)
            self.trackers = Trackers(
                self.accelerator, dataclasses.asdict(self.options), step=self.train_state.step
            )
            if self.accelerator.is_main_process:
                with self.report.base_model():
                    self.report.before_training()
            self.accelerator.wait_for_everyone()

    def _generate_validation_images(self, step: Step) -> None:
        report = self.report
        folder = Path(self.options.output_dir) / "validation" / f"step-{step.index}"
        earlier_failures = len(report.failures)
        with report.attempt(f"validation at step {step.index}"):
            path = checkpoint_io.save_adapter(self.train_state, folder)
            with checkpoint_io.reloaded_from_file(report.model.pipe, path) as adapter:
                adapter.to(self.accelerator.device)  # layers of blocks in main memory are elsewhere
                images = report.validate(folder)
            self.progress.log_images("validation", images, step.index)
        for failure in report.failures[earlier_failures:]:
            self.progress.say(failure)

    def _finish(self) -> None:
        """Writes the adapter's file first; then exports, images and metrics, which may fail without harm."""
        with self.placement.on_device(self.unused_components), gathered(self.denoiser):
            if self.accelerator.is_main_process:
                # Results of an earlier ending must not be taken for those of this one.
                output_folder.remove(Path(self.options.output_dir), RESULTS)
                path = checkpoint_io.save_adapter(self.train_state, self.options.output_dir)
                try:
                    self._write_results(path)
                except KeyboardInterrupt:
                    tqdm.write(self._saved_message("stopped"), file=sys.stderr)
                    raise
            self.accelerator.wait_for_everyone()

    def _write_results(self, path: Path) -> None:
        """Writes the exports of the saved adapter, then images and metrics made with it, then uploads."""
        report = self.report
        for attached in da.attached(report.model.pipe).values():  # the trained one, and an assistant
            da.detach(attached)
        adapter = da.load(report.model.pipe, path)  # as `diffadapt sample` does
        adapter.to(self.accelerator.device)
        report.write_record(adapter, {})  # whatever fails after this, the adapter has its record
        exported = []
        with report.attempt("export"), self.placement.restored():
            exported = write_formats(adapter, path, self.options.export_formats)
        print(report.after_training(adapter))
        for line in exported:
            print(line)
        if self.options.push_to_hub:
            with report.attempt("upload"):
                print(f"uploaded: {push(self.options)}")
        if report.failures:
            self.exit_code = 1
            failures = "".join(f"\n  {failure}" for failure in report.failures)
            print(self._saved_message(f"error: not everything succeeded:{failures}\n"), file=sys.stderr)

    def _saved_message(self, event: str) -> str:
        """The event, where the result is, and how to repeat the end of the run."""
        output = self.options.output_dir
        return (
            f"{event}; the adapter is saved: {output}/adapter.safetensors, and {output}/run.json; to repeat "
            "the end of the run: the same command with --resume_from_checkpoint latest"
        )


def _is_due(step: Step, every: int | None) -> bool:
    """Whether something happens after this step that is done every so many steps; None or 0: never."""
    return bool(every) and step.index % every == 0
