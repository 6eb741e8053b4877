"""What a run shows of its result: pictures before and after, figures, a grid, run.json and a model card.

`Report` is the part all scripts share. A derived class says what is drawn, measured and put beside what.
"""

import dataclasses
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
from diffadapt.common import runtime
from diffadapt.common.contact_sheet import Panel, make_contact_sheet, to_pil_images
from diffadapt.data.summary import describe_truncated_captions
from diffadapt.formats.export import parse_formats
from diffadapt.formats.export.rehearsal import obstacle
from diffadapt.metrics.features import load_clip
from diffadapt.models.base_names import is_embedded
from diffadapt.models.sampling import ImageRequest, SamplingConfig, generate
from diffadapt.models.text_conditioned import truncated_prompts
from diffadapt.training.checkpoint.checkpoint_io import save_adapter
from diffadapt.training.loop import TrainState
from diffadapt.training.parsing import write_config
from diffadapt.training.report.model_card import write_card
from diffadapt.training.report.summary import closing_message
from diffadapt.training.run_log import write_run
from diffadapt.training.setup import Setup

MOST_STORED_FOR_TRIAL = 50_000_000  # trained values that are written to a temporary file before a run
Pictures = dict[str, Tensor]  # kind of shot -> (N, 3, H, W) in [0, 1]
Figures = dict[str, dict[str, float]]  # name[extractor] -> {"before": ..., "after": ...}


class Report(ABC):
    """Collects the pictures of a run and writes what it leaves for people. For the main process.

    Attributes:
        shots: kind of shot -> shots; the same are drawn before and after.
        pictures: "before" and "after" -> kind of shot -> pictures.
    """

    def __init__(self, setup: Setup):
        self.model, self.options, self._started = setup.model, setup.options, setup.started
        options = setup.options
        self.sampler = SamplingConfig(
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            batch_size=options.sample_batch_size,
            height=options.resolution,
            width=options.resolution,
            autocast=runtime.autocast_dtype(setup.accelerator),
        )
        self.requests: dict[str, list[ImageRequest]] = {}
        self.images: dict[str, Pictures] = {}
        self.failures: list[str] = []  # what went wrong beside the result itself
        self.export_note: str | None = None  # why the default format will not be written

    @abstractmethod
    def panels(self) -> list[list[Panel]]:
        """Rows of panels of the grid, from `self.images["before"]` and `["after"]`."""

    @abstractmethod
    def subject(self) -> str:
        """What was trained, in few words, for titles: a prompt, or the name of a data set."""

    @abstractmethod
    def data_summary(self) -> str:
        """What it was trained on, as "5 training pictures"."""

    @abstractmethod
    def prompt_options(self) -> str:
        """The options of `diffadapt sample` that say what to draw, as `--prompt 'a sks dog'`."""

    @abstractmethod
    def own_data_command(self) -> str:
        """After the demonstration: the full command for own data on a real base."""

    def figures(self) -> Figures:
        """Figures of `self.images`; only asked for with `--extractor`."""
        return {}

    def heldout_losses(self) -> Figures:
        """Figures of the model itself, which need neither pictures nor an extractor."""
        return {}

    def summary_rows(self) -> dict[str, str]:
        """Further rows of the summary before the first step: name -> text."""
        return {}

    def truncated_prompts(self) -> dict[str, str]:
        """For the summary: which words of the prompts that are drawn the base does not read."""
        prompts = [shot.prompt for some in self.requests.values() for shot in some if shot.label is None]
        cuts = truncated_prompts(self.model.pipe, prompts) if self.options.num_validation_images else []
        return {"prompts": describe_truncated_captions(cuts)} if cuts else {}

    def run_json_fields(self) -> dict[str, object]:
        """Further values of run.json."""
        return {}

    def base_model(self) -> AbstractContextManager:
        """Within the context the model is as before training."""
        return disabled(self.model.pipe)

    def validation_requests(self) -> list[ImageRequest]:
        """What is drawn in between: as many as `--num_validation_images`, of every kind in turn."""
        kinds = [some for some in self.requests.values() if some]
        mixed = [some[i] for i in range(max(map(len, kinds), default=0)) for some in kinds if i < len(some)]
        return mixed[: self.options.num_validation_images]

    def before_training(self) -> None:
        """Draws the pictures of the untrained base."""
        if self.options.num_validation_images:
            self._generate_all("before")

    def validate(self, folder: Path) -> Tensor:
        """Draws the validation shots with what is attached now into folder/000-seed0.png, ... and sheet.png.

        Returns: (N, 3, H, W) in [0, 1].
        """
        wanted = self.validation_requests()
        images = self._generate(wanted, f"pictures of {folder.name}")
        pictures = to_pil_images(images)
        for index, (shot, picture) in enumerate(zip(wanted, pictures, strict=True)):
            picture.save(folder / f"{index:03d}-seed{shot.seed}.png")
        captions = [shot.prompt for shot in wanted]
        sheet = make_contact_sheet(
            [[Panel(folder.name, pictures, 4, captions)]], title=self._title(), note=""
        )
        sheet.save(folder / "sheet.png")
        return images

    def after_training(self, adapter: Adapter) -> str:
        """Generates again; writes figures, grid, run.json and the model card.

        What fails costs itself only and is noted in `self.failures`; run.json is there before and after.
        Returns: the closing words.
        """
        options = self.options
        self.write_record(adapter, {})
        values: Figures = {}
        with self.attempt("the loss on images"):
            values |= self.heldout_losses()
        if options.num_validation_images:
            with self.attempt("images after training"):
                self._generate_all("after")
        if "after" in self.images:
            if options.extractor:
                with self.attempt("figures"):
                    values |= self.figures()
            with self.attempt("grid.png"):
                self._grid(adapter).save(Path(options.output_dir) / "grid.png")
        record = self.write_record(adapter, values)
        words = {"draw": self._sample_options(), "further": self.own_data_command()}
        return closing_message(options, values, seconds=record["seconds"], **words)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Notes a failure of something that the run's result does not depend on, and lets the run go on."""
        try:
            yield
        except Exception as error:  # models, trackers and the hub raise kinds of their own
            self.failures.append(f"{what}: {str(error) or type(error).__name__}")

    def try_outputs(self, train_state: TrainState) -> None:
        """Tries, before the first step, what a run needs at its end.

        Raises: ValueError or OSError of what could not be done then: reading the extractor, exporting and
            storing the adapter with its configuration, writing the model card.
        """
        options = self.options
        if options.extractor and options.num_validation_images:
            try:
                self.load_extractor()
            except (OSError, ValueError) as error:
                raise ValueError(f"--extractor {options.extractor} cannot be loaded: {error}") from error
        if train_state.adapter.num_parameters <= MOST_STORED_FOR_TRIAL:
            self.check_exports(train_state.adapter)
        with TemporaryDirectory() as folder:
            if train_state.adapter.num_parameters <= MOST_STORED_FOR_TRIAL:
                da.read_metadata(save_adapter(train_state, folder))
            write_config(options, folder)
            record = self._record(train_state.adapter, {})
            write_card(Path(folder), options, record, title=self._title(), draw=self._sample_options())

    def check_exports(self, adapter: Adapter) -> None:
        """Tries the formats of `--export_formats`; that the default one cannot be written is only a notice.

        Raises: ValueError for a format that was asked for and cannot hold the adapter.
        """
        for name in parse_formats(self.options.export_formats):
            reason = obstacle(adapter, name)
            if reason is None:
                continue
            reason = reason.replace("--to ", "--export_formats ")  # `diffadapt export` calls it --to
            if self.options.export_formats is not None:
                raise ValueError(f"--export_formats {name} cannot hold {self.options.adapter}: {reason}")
            self.export_note = f"no file for other programs (--export_formats {name}): {reason}"

    def load_extractor(self) -> object:
        """The model of `--extractor`."""
        return load_clip(self.options.extractor)

    def write_record(self, adapter: Adapter, values: Figures) -> dict[str, object]:
        """Writes run.json and the model card. Returns what run.json holds."""
        output = Path(self.options.output_dir)
        record = self._record(adapter, values)
        write_run(output / "run.json", record)
        with self.attempt("README.md"):
            title = self._title(adapter)
            write_card(output, self.options, record, title=title, draw=self._sample_options())
        return record

    def _record(self, adapter: Adapter, values: Figures) -> dict[str, object]:
        options = self.options
        return {
            "demo": is_embedded(options.pretrained_model_name_or_path),
            "method": str(adapter.method),
            "parameters": adapter.num_parameters,
            "steps": options.max_train_steps,
            "seconds": round(time.perf_counter() - self._started, 1),
            "figures": values,
            **self.run_json_fields(),
            **({"failures": list(self.failures)} if self.failures else {}),
            "options": dataclasses.asdict(options),
        }

    def _sample_options(self) -> str:
        """Options of `diffadapt sample` that make the pictures of this run again."""
        options, parts = self.options, [self.prompt_options()]
        for name in ("num_inference_steps", "guidance_scale"):
            value = getattr(options, name)
            parts += [f"--{name} {value:g}"] if value != self.model.profile.defaults.get(name) else []
        return " ".join(
            parts + [f"--mixed_precision {options.mixed_precision}"] * bool(self.sampler.autocast)
        )

    def _generate(self, wanted: Sequence[ImageRequest], label: str) -> Tensor:
        images = []
        with tqdm(desc=label, total=len(wanted), leave=False) as bar:
            for batch in generate(self.model.pipe, wanted, self.sampler):
                images.append(batch)
                bar.update(len(batch))
        return torch.cat(images)

    def _generate_all(self, when: str) -> None:
        everything = [shot for some in self.requests.values() for shot in some]
        parts = self._generate(everything, f"pictures {when}").split([len(s) for s in self.requests.values()])
        self.images[when] = dict(zip(self.requests, parts, strict=True))
        folder = Path(self.options.output_dir) / "samples" / when
        folder.mkdir(parents=True, exist_ok=True)
        for kind, images in self.images[when].items():
            for index, picture in enumerate(to_pil_images(images)):
                picture.save(folder / f"{kind}-{index:02d}.png")

    def _title(self, adapter: Adapter | None = None) -> str:
        base = self.options.pretrained_model_name_or_path
        name = self.options.adapter if adapter is None else adapter.method.name
        return ("DEMO · " if is_embedded(base) else "") + f"{name} on {base}: {self.subject()}"

    def _grid(self, adapter: Adapter) -> Image.Image:
        steps, count = self.options.max_train_steps, adapter.num_parameters
        note = f"{self.data_summary()}, {steps} steps, {count:,} trained parameters"
        if is_embedded(self.options.pretrained_model_name_or_path):
            note += " · a small base shipped for demonstration; for real pictures name a real base"
        return make_contact_sheet(self.panels(), title=self._title(adapter), note=note)
