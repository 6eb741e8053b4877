"""Images of subjects from a base and its adapters: every prompt, every sample, the same seeds for all."""

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
ADAPTERS = "adapters"  # label of those with each subject's own

Sets = dict[str, tuple[list[SubjectImages], dict]]  # label -> the images of every subject, and how they came


@dataclass(frozen=True)
class Drawing:
    """How images are drawn.

    Attributes:
        base: name of the pipeline.
        folder: where the images go: LABEL/SUBJECT/NN-S.png, prompt and sample.
        samples: images of each prompt.
        unique_token: the unique word of the prompts.
        seed: of the first subject's first sample; samples of one subject have consecutive seeds, the same
            for every prompt, and every subject has its own.
        num_inference_steps, guidance_scale: None for what suits the base.
        mixed_precision: no, fp16 or bf16; None for what `sampling_precision` chooses.
    """

    base: str
    folder: Path
    samples: int = 4
    unique_token: str = "sks"
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 8
    mixed_precision: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"--samples must be at least 1, got {self.samples}")

    @property
    def precision(self) -> Precision:
        return sampling_precision(self.mixed_precision, PartialState().device)

    def sampler(self) -> SamplingConfig:
        defaults = sampling_defaults(self.base)
        steps = (
            defaults["num_inference_steps"] if self.num_inference_steps is None else self.num_inference_steps
        )
        guidance = defaults["guidance_scale"] if self.guidance_scale is None else self.guidance_scale
        return SamplingConfig(
            num_inference_steps=steps,
            guidance_scale=guidance,
            batch_size=self.batch_size,
            autocast=self.precision.dtype,
        )

    def shots(self, subject: Subject, place: int) -> list[ImageRequest]:
        """All images of the subject at that place in the list, prompt by prompt."""
        first = self.seed + place * self.samples
        return [
            ImageRequest(p, first + s)
            for p in subject.prompts(self.unique_token)
            for s in range(self.samples)
        ]


def draw_subjects(
    drawing: Drawing, subjects: Sequence[Subject], adapters: Mapping[str, str], *, with_base: bool
) -> Sets:
    """Images with each subject's own adapter, and of the bare base where asked for, as files.

    With several processes each draws whole batches of every subject's images.
    """
    state, sampler = PartialState(), drawing.sampler()
    for notice in drawing.precision.notices:
        state.print(notice)
    pipe = open_frozen_pipeline(drawing.base, device=state.device)
    labels = [*([BASE] if with_base else []), *([ADAPTERS] if adapters else [])]
    found: Sets = {}
    total = sum(len(drawing.shots(s, 0)) for s in subjects) * len(labels)
    with tqdm(desc="images", total=total, disable=not state.is_main_process) as bar:
        for label in labels:
            images = []
            for place, subject in enumerate(subjects):
                adapter = da.load(pipe, adapters[subject.name]) if label == ADAPTERS else None
                images.append(_draw(drawing, pipe, sampler, subject, place, drawing.folder / label, bar))
                if adapter is not None:
                    da.detach(adapter)
            made = {"base": drawing.base, "samples": drawing.samples, **vars(sampler)}
            made["autocast"] = drawing.precision.name
            if label == ADAPTERS:
                made |= {"adapters": dict(adapters), **_training(adapters)}
            found[label] = (images, made)
    return found


def _draw(
    drawing: Drawing,
    pipe: DiffusionPipeline,
    sampler: SamplingConfig,
    subject: Subject,
    place: int,
    folder: Path,
    bar: tqdm,
) -> SubjectImages:
    (folder / subject.name).mkdir(parents=True, exist_ok=True)
    shots = drawing.shots(subject, place)
    places = [divmod(index, drawing.samples) for index in range(len(shots))]
    names = [f"{subject.name}/{number:02d}-{sample}.png" for number, sample in places]
    generate_files(pipe, shots, sampler, [folder / name for name in names], bar)
    return SubjectImages(
        subject,
        tuple(ImageFile(name, folder / name) for name in names),
        tuple(number for number, _ in places),
        tuple(shot.seed for shot in shots),
    )


def _training(adapters: Mapping[str, str]) -> dict[str, dict]:
    """What the adapters' run.json say of their cost, the mean over subjects, where all have one."""
    files = [Path(path).with_name("run.json") for path in adapters.values()]
    if not all(file.is_file() for file in files):
        return {}
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    keys = ("parameters", "seconds", "peak_memory_bytes")
    known = [key for key in keys if all(key in run for run in runs)]
    return {"run": {key: sum(run[key] for run in runs) / len(runs) for key in known}}
