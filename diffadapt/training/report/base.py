"""The report of a run: images before and after training, metrics, a grid, run.json and a model card.

`Report` is what all scripts share. A derived class says which images are generated, what is measured of them,
and how they are laid out.
"""

import dataclasses
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import diffadapt as da
from diffadapt.adapters.adapter import Adapter
from diffadapt.adapters.attach import disabled
from diffadapt.common.contact_sheet import Panel, make_contact_sheet, to_pil_images
from diffadapt.data.summary import describe_truncated_captions
from diffadapt.formats.export import parse_formats
from diffadapt.formats.export.rehearsal import obstacle
from diffadapt.metrics.features import load_clip
from diffadapt.models.denoiser_loading import QUANTISED
from diffadapt.models.sampling import ImageRequest, PromptStates, generate, truncated_prompts
from diffadapt.training.checkpoint.checkpoint_io import save_adapter
from diffadapt.training.loop import TrainState
from diffadapt.training.parsing import write_config
from diffadapt.training.report.model_card import write_card
from diffadapt.training.report.summary import MetricValues, closing_message
from diffadapt.training.run_log import write_run
from diffadapt.training.setup import Setup, sampling_config

MAX_TRIED_PARAMETERS = 50_000_000  # larger adapters are not written to a temporary file before a run
SHEET_COLUMNS = 4  # of a validation's contact sheet
ImagesByKind = dict[str, Tensor]  # kind of image -> (N, 3, H, W) in [0, 1]


class Report(ABC):
    """Generates the images of a run and writes its results. For the main process.

    Attributes:
        requests: kind of image -> what to generate, the same before and after training.
        images: "before" and "after" -> kind of image -> images.
        failures: a line for each thing that went wrong beside the adapter itself.
        prompt_states: conditions of encoded prompts, where the text encoders are gone.
        export_note: why the default export format will not be written, if so.
    """

    def __init__(self, setup: Setup):
        options = setup.options
        self.model = setup.model
        self.options = options
        self.sampler = sampling_config(setup)
        self.prompt_states: PromptStates | None = None
        self.requests: dict[str, list[ImageRequest]] = {}
        self.images: dict[str, ImagesByKind] = {}
        self.failures: list[str] = []
        self.export_note: str | None = None
        self._started = setup.started

    # What a script's report defines

    @abstractmethod
    def panels(self) -> list[list[Panel]]:
        """Rows of panels of the grid, from `self.images["before"]` and `["after"]`."""

    @abstractmethod
    def subject(self) -> str:
        """What was trained, for titles: a prompt, or the name of a data set."""

    @abstractmethod
    def data_summary(self) -> str:
        """The training data in a few words, as "5 training images"."""

    @abstractmethod
    def prompt_options(self) -> str:
        """The options of `diffadapt sample` that say what to generate, as `--prompt 'a sks dog'`."""

    @abstractmethod
    def own_data_command(self) -> str:
        """The full command for own data on a real base, shown after the demonstration."""

    def metrics(self) -> MetricValues:
        """Metrics of `self.images`; only called with `--extractor`."""
        return {}

    def heldout_losses(self) -> MetricValues:
        """Losses of the model on images, which need neither generated images nor an extractor."""
        return {}

    def summary_rows(self) -> dict[str, str]:
        """More rows of the summary before the first step: name -> text."""
        return {}

    def run_json_fields(self) -> dict[str, object]:
        """More values of run.json."""
        return {}

    def base_model(self) -> AbstractContextManager:
        """Within the context the model is as before training."""
        return disabled(self.model.pipe)

    def load_extractor(self) -> object:
        """Loads the model of `--extractor`."""
        return load_clip(self.options.extractor)

    def all_requests(self) -> list[ImageRequest]:
        """The images of all kinds, in order."""
        requests = []
        for requests_of_kind in self.requests.values():
            requests += requests_of_kind
        return requests

    # Before the first step

    def try_outputs(self, train_state: TrainState) -> None:
        """Tries what the run needs at its end, so that it fails now and not after hours.

        Raises:
            ValueError, OSError: something could not be done then: reading the extractor, exporting and
                storing the adapter with its configuration, writing the model card.
        """
        options = self.options
        adapter = train_state.adapter
        # Storing a large adapter twice would cost more time than it saves.
        is_small = adapter.num_parameters <= MAX_TRIED_PARAMETERS and self.model.has_weights
        if options.extractor and options.num_validation_images:
            try:
                self.load_extractor()
            except (OSError, ValueError) as error:
                raise ValueError(f"--extractor {options.extractor} cannot be loaded: {error}") from error
        if is_small:
            self.check_exports(adapter)
        with TemporaryDirectory() as folder:
            if is_small:
                da.read_metadata(save_adapter(train_state, folder))
            write_config(options, folder)
            record = self._record(adapter, {})
            write_card(
                Path(folder), options, record, title=self._title(), sample_options=self._sample_options()
            )

    def check_exports(self, adapter: Adapter) -> None:
        """Tries the formats of `--export_formats`; if the default one cannot be written, that is only noted.

        Raises:
            ValueError: a format that was asked for cannot hold the adapter.
        """
        for name in parse_formats(self.options.export_formats):
            reason = obstacle(adapter, name)
            if reason is None:
                continue
            reason = reason.replace("--to ", "--export_formats ")  # `diffadapt export` calls it --to
            if self.options.export_formats is not None:
                raise ValueError(f"--export_formats {name} cannot hold {self.options.adapter}: {reason}")
            self.export_note = f"no file for other programs (--export_formats {name}): {reason}"

    def truncated_prompts(self) -> dict[str, str]:
        """A row of the summary about prompts that are longer than the text encoders read; or none."""
        if not self.options.num_validation_images:
            return {}
        prompts = [request.prompt for request in self.all_requests() if request.label is None]
        truncated = truncated_prompts(self.model.pipe, prompts)
        return {"prompts": describe_truncated_captions(truncated)} if truncated else {}

    def before_training(self) -> None:
        """Generates the images of the untrained base."""
        if self.options.num_validation_images:
            self._generate_all("before")

    # In between

    def validation_requests(self) -> list[ImageRequest]:
        """The images of a validation: `--num_validation_images`, from the kinds in turn."""
        mixed = []
        longest = max((len(requests) for requests in self.requests.values()), default=0)
        for index in range(longest):
            for requests in self.requests.values():
                mixed += requests[index : index + 1]  # empty behind the end of a shorter kind
        return mixed[: self.options.num_validation_images]

    def validate(self, folder: Path) -> Tensor:
        """Generates the images of a validation into folder/000-seed0.png, ... and folder/sheet.png.

        Returns:
            (N, 3, H, W) in [0, 1].
        """
        requests = self.validation_requests()
        images = self._generate(requests, f"images of {folder.name}")
        pil_images = to_pil_images(images)
        for index, (request, image) in enumerate(zip(requests, pil_images, strict=True)):
            image.save(folder / f"{index:03d}-seed{request.seed}.png")
        prompts = [request.prompt for request in requests]
        panel = Panel(folder.name, pil_images, SHEET_COLUMNS, prompts)
        make_contact_sheet([[panel]], title=self._title(), note="").save(folder / "sheet.png")
        return images

    # After the last step

    def after_training(self, adapter: Adapter) -> str:
        """Generates the images again; writes metrics, grid, run.json and the model card.

        What fails is noted in `self.failures`, and everything else is written; run.json is there before and
        after.

        Returns:
            The closing message.
        """
        options = self.options
        # written now, without metrics, in case the process is killed while it makes images
        self.write_record(adapter, {})
        values: MetricValues = {}
        # The loss first: it does not depend on generating images, which may run out of memory.
        with self.attempt("the loss on images"):
            values |= self.heldout_losses()
        if options.num_validation_images:
            with self.attempt("images after training"):
                self._generate_all("after")
        if "after" in self.images:
            if options.extractor:
                with self.attempt("metrics"):
                    values |= self.metrics()
            with self.attempt("grid.png"):
                self._grid(adapter).save(Path(options.output_dir) / "grid.png")
        record = self.write_record(adapter, values)
        return closing_message(
            options,
            values,
            seconds=record["seconds"],
            sample_options=self._sample_options(),
            own_data_command=self.own_data_command(),
        )

    def write_record(self, adapter: Adapter, values: MetricValues) -> dict[str, object]:
        """Writes run.json and the model card.

        Returns:
            The content of run.json.
        """
        output = Path(self.options.output_dir)
        record = self._record(adapter, values)
        write_run(output / "run.json", record)
        with self.attempt("README.md"):
            title = self._title(adapter)
            write_card(output, self.options, record, title=title, sample_options=self._sample_options())
        return record

    @contextmanager
    def attempt(self, step: str) -> Iterator[None]:
        """Notes a failure of something that the run's result does not depend on, and lets the run go on."""
        try:
            yield
        except Exception as error:  # models, trackers and the hub raise kinds of their own
            self.failures.append(f"{step}: {str(error) or type(error).__name__}")

    def _generate_all(self, when: str) -> None:
        """Generates every request into `self.images[when]` and samples/`when`/KIND-00.png, ..."""
        images = self._generate(self.all_requests(), f"images {when}")
        sizes = [len(requests) for requests in self.requests.values()]
        # one call for all kinds fills the batches; the images come back in the order of the requests
        self.images[when] = dict(zip(self.requests, images.split(sizes), strict=True))
        folder = Path(self.options.output_dir) / "samples" / when
        folder.mkdir(parents=True, exist_ok=True)
        for kind, images in self.images[when].items():
            for index, image in enumerate(to_pil_images(images)):
                image.save(folder / f"{kind}-{index:02d}.png")

    def _generate(self, requests: Sequence[ImageRequest], label: str) -> Tensor:
        """Images of the requests with a progress bar, (N, 3, H, W) in [0, 1]."""
        batches = []
        with tqdm(desc=label, total=len(requests), leave=False) as bar:
            for batch in generate(self.model.pipe, requests, self.sampler, prompt_states=self.prompt_states):
                batches.append(batch)
                bar.update(len(batch))
        return torch.cat(batches)

    def _record(self, adapter: Adapter, values: MetricValues) -> dict[str, object]:
        """The content of run.json, apart from memory and versions."""
        options = self.options
        record = {
            "demo": options.is_demo,
            "method": str(adapter.method),
            "parameters": adapter.num_parameters,
            "steps": options.max_train_steps,
            "seconds": round(time.perf_counter() - self._started, 1),
            "figures": values,
        }
        record |= self.run_json_fields()
        if self.failures:
            record["failures"] = list(self.failures)
        record["options"] = dataclasses.asdict(options)
        return record

    def _sample_options(self) -> str:
        """Options of `diffadapt sample` that generate the images of this run again."""
        defaults = self.model.profile.defaults
        parts = [self.prompt_options()]
        for name in ("num_inference_steps", "guidance_scale"):
            value = getattr(self.options, name)
            if value != defaults.get(name):
                parts.append(f"--{name} {value:g}")
        if self.options.base_precision in QUANTISED:
            parts.append(f"--base_precision {self.options.base_precision}")
        if self.options.transformer is not None:
            parts.append(f"--transformer {shlex.quote(self.options.transformer)}")
        if self.sampler.autocast:
            parts.append(f"--mixed_precision {self.options.mixed_precision}")
        return " ".join(parts)

    def _title(self, adapter: Adapter | None = None) -> str:
        base = self.options.pretrained_model_name_or_path
        method = self.options.adapter if adapter is None else adapter.method.name
        demo = "DEMO · " if self.options.is_demo else ""
        return f"{demo}{method} on {base}: {self.subject()}"

    def _grid(self, adapter: Adapter) -> Image.Image:
        options = self.options
        note = (
            f"{self.data_summary()}, {options.max_train_steps} steps, {adapter.num_parameters:,} trained "
            "parameters"
        )
        if options.is_demo:
            note += " · a small base shipped for demonstration; for real images name a real base"
        return make_contact_sheet(self.panels(), title=self._title(adapter), note=note)
