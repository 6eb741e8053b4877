"""Images of subjects from a base model and its adapters: the same prompts and seeds for all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm import tqdm

import diffadapt as da
from diffadapt.common.precision import Precision, sampling_precision
from diffadapt.evaluation.generated_files import generate_files
from diffadapt.evaluation.sets.image_files import ImageFile
from diffadapt.evaluation.subject.subjects import Subject, SubjectImages
from diffadapt.models.families import sampling_defaults
from diffadapt.models.open_pipeline import open_frozen_pipeline
from diffadapt.models.sampling import ImageRequest, SamplingConfig

BASE = "base"  # label of the images without an adapter
ADAPTERS = "adapters"  # label of the images with each subject's own adapter
RUN_COSTS = ("parameters", "seconds", "peak_memory_bytes")  # in the run.json of a training run

# label -> the images of every subject, and how they were generated
SubjectSets = dict[str, tuple[list[SubjectImages], dict[str, object]]]


@dataclass(frozen=True)
class SubjectSampling:
    """How images of subjects are generated.

    Attributes:
        base: name of the pipeline.
        folder: where the images are saved, as LABEL/SUBJECT/NN-S.png with NN the prompt and S the sample.
        samples: images of each prompt.
        unique_token: the unique word of the prompts.
        seed: of the first subject's first sample; samples of one subject have consecutive seeds, the same
            for every prompt, and every subject has its own.
        num_inference_steps: denoising steps; None for the base's default.
        guidance_scale: of classifier-free guidance; None for the base's default.
        side: of the square images in pixels; None for the base's own size.
        batch_size: images generated at once; changes speed and memory only.
        mixed_precision: no, fp16 or bf16; None for the choice of `sampling_precision`.
    """

    base: str
    folder: Path
    samples: int = 4
    unique_token: str = "sks"
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    side: int | None = None
    batch_size: int = 8
    mixed_precision: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"--samples must be at least 1, got {self.samples}")

    @property
    def precision(self) -> Precision:
        """The precision of the denoiser on this process's device."""
        return sampling_precision(self.mixed_precision, PartialState().device)

    def config(self) -> SamplingConfig:
        """The options of the sampler, with the base's defaults."""
        options = sampling_defaults(self.base)
        steps = self.num_inference_steps
        guidance = self.guidance_scale
        return SamplingConfig(
            num_inference_steps=options["num_inference_steps"] if steps is None else steps,
            guidance_scale=options["guidance_scale"] if guidance is None else guidance,
            height=self.side,
            width=self.side,
            batch_size=self.batch_size,
            autocast=self.precision.dtype,
        )

    def requests(self, subject: Subject, position: int) -> list[ImageRequest]:
        """All images of a subject, prompt by prompt.

        Args:
            position: of the subject in the list of all, which its seeds depend on.
        """
        first_seed = self.seed + position * self.samples
        requests = []
        for prompt in subject.prompts(self.unique_token):
            for sample in range(self.samples):
                requests.append(ImageRequest(prompt, first_seed + sample))
        return requests


def generate_subjects(
    sampling: SubjectSampling, subjects: Sequence[Subject], adapters: Mapping[str, str], *, with_base: bool
) -> SubjectSets:
    """Generates images with each subject's own adapter, and with the bare base, into files.

    With several processes each generates whole batches of every subject's images.

    Args:
        adapters: subject -> file of its adapter; empty for the base alone.
        with_base: whether to generate images with the bare base too.
    """
    state = PartialState()
    config = sampling.config()
    for notice in sampling.precision.notices:
        state.print(notice)
    pipe = open_frozen_pipeline(sampling.base, device=state.device)
    labels = []
    if with_base:
        labels.append(BASE)
    if adapters:
        labels.append(ADAPTERS)
    sets: SubjectSets = {}
    images_per_label = 0
    for subject in subjects:
        images_per_label += len(sampling.requests(subject, 0))
    total = len(labels) * images_per_label
    with tqdm(desc="images", total=total, disable=not state.is_main_process) as bar:
        for label in labels:
            images = []
            for position, subject in enumerate(subjects):
                adapter = da.load(pipe, adapters[subject.name]) if label == ADAPTERS else None
                images.append(_generate(sampling, pipe, config, subject, position, label, bar))
                if adapter is not None:
                    da.detach(adapter)
            generation = {"base": sampling.base, "samples": sampling.samples, **vars(config)}
            generation["autocast"] = sampling.precision.name
            if label == ADAPTERS:
                generation["adapters"] = dict(adapters)
                generation |= _training_costs(adapters)
            sets[label] = (images, generation)
    return sets


def _generate(
    sampling: SubjectSampling,
    pipe: DiffusionPipeline,
    config: SamplingConfig,
    subject: Subject,
    position: int,
    label: str,
    bar: tqdm,
) -> SubjectImages:
    """Generates the images of one subject with what is attached now."""
    folder = sampling.folder / label
    (folder / subject.name).mkdir(parents=True, exist_ok=True)
    requests = sampling.requests(subject, position)
    paths = []
    images = []
    numbers = []
    seeds = []
    for index, request in enumerate(requests):
        number, sample = divmod(index, sampling.samples)  # requests go prompt by prompt
        name = f"{subject.name}/{number:02d}-{sample}.png"
        paths.append(folder / name)
        images.append(ImageFile(name, folder / name))
        numbers.append(number)
        seeds.append(request.seed)
    generate_files(pipe, requests, config, paths, bar)
    return SubjectImages(subject, tuple(images), tuple(numbers), tuple(seeds))


def _training_costs(adapters: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The costs in the run.json beside the adapters, means over subjects, where all have one."""
    runs = []
    for path in adapters.values():
        run_file = Path(path).with_name("run.json")
        if not run_file.is_file():
            return {}
        runs.append(json.loads(run_file.read_text(encoding="utf-8")))
    costs = {}
    for key in RUN_COSTS:
        values = [run[key] for run in runs if key in run]
        if len(values) == len(runs):
            costs[key] = sum(values) / len(values)
    return {"run": costs}
