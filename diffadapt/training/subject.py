"""Before and after a subject run: the pictures that show what was learned, and figures of it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffadapt.adapter import Adapter
from diffadapt.data.grid import Panel, grid, to_pictures
from diffadapt.data.images import list_images, open_image, to_pixels
from diffadapt.metrics.features import ClipFeatures, load_clip
from diffadapt.metrics.similarity import mean_similarity, nearest_similarity, paired_similarity
from diffadapt.models.names import is_embedded, resolve
from diffadapt.models.prompts import UNRELATED, contexts, without_identifier
from diffadapt.models.sd import StableDiffusion
from diffadapt.sampling import Sampler, Shot, draw, shots
from diffadapt.training.options import TrainOptions, write_config
from diffadapt.training.record import write_run
from diffadapt.training.summary import closing_words

Pictures = dict[str, Tensor]  # kind of shot -> (N, 3, H, W) in [0, 1]


@dataclass(frozen=True)
class Showing:
    """The same shots are made before and after: of the subject, in new contexts, and of unrelated things."""

    subject: list[Shot]
    contexts: list[Shot]
    unrelated: list[Shot]

    def take(self, pipe: DiffusionPipeline, sampler: Sampler, *, when: str) -> Pictures:
        """Draws all shots, with a progress bar that says `when`."""
        wanted = {"subject": self.subject, "contexts": self.contexts, "unrelated": self.unrelated}
        everything, images = [shot for some in wanted.values() for shot in some], []
        with tqdm(desc=f"pictures {when}", total=len(everything)) as bar:
            for batch in draw(pipe, everything, sampler):
                images.append(batch)
                bar.update(len(batch))
        return dict(zip(wanted, torch.cat(images).split([len(s) for s in wanted.values()]), strict=True))


def showing(
    family: str, instance_prompt: str, *, count: int, validation_prompt: str | None, seed: int, measured: bool
) -> Showing:
    """The shots of a run; unrelated prompts, and all ten contexts, only when figures are made of them."""
    if validation_prompt is not None:
        context_shots = shots(validation_prompt, count, seed=seed)
    else:
        prompts = contexts(family, instance_prompt)
        prompts = prompts if measured else prompts[:count]
        context_shots = [Shot(prompt, seed + i) for i, prompt in enumerate(prompts)]
    unrelated = [Shot(prompt, seed + i) for i, prompt in enumerate(UNRELATED[family])] if measured else []
    return Showing(shots(instance_prompt, count, seed=seed), context_shots, unrelated)


def figures(
    extractor: ClipFeatures,
    *,
    real: Tensor,
    before: Pictures,
    after: Pictures,
    texts: Sequence[str],
) -> dict[str, dict[str, float]]:
    """What changed, in cosines between features; every figure names its extractor.

    Args:
        real: (N, 3, H, W) training pictures.
        texts: what the context shots should show, in words the extractor knows.
    Returns: figure -> {"before": ..., "after": ...}; drift has only "after".
    """
    subject, words = extractor.images([real]), extractor.texts(texts)
    values: dict[str, dict[str, float]] = {
        "subject_similarity": {},
        "text_agreement": {},
        "nearest_training_image": {},
    }
    for when, pictures in (("before", before), ("after", after)):
        drawn = extractor.images([pictures["subject"]])
        values["subject_similarity"][when] = mean_similarity(drawn, subject)
        values["text_agreement"][when] = paired_similarity(extractor.images([pictures["contexts"]]), words)
        values["nearest_training_image"][when] = nearest_similarity(drawn, subject)
    pair = (extractor.images([pictures["unrelated"]]) for pictures in (before, after))
    values["drift"] = {"after": 1 - paired_similarity(*pair)}
    return {f"{name}[{extractor.name}]": value for name, value in values.items()}


def context_texts(plan: Showing, *, instance_prompt: str, class_prompt: str | None) -> list[str]:
    """The context prompts without the made-up word for the subject."""
    return [
        without_identifier(shot.prompt, instance_prompt=instance_prompt, class_prompt=class_prompt)
        for shot in plan.contexts
    ]


def training_pictures(paths: Sequence[Path], resolution: int) -> Tensor:
    """(N, 3, resolution, resolution) in [0, 1]."""
    return torch.stack([to_pixels(open_image(path), resolution) / 2 + 0.5 for path in paths])


def comparison(
    plan: Showing, *, real: Tensor, before: Pictures, after: Pictures, title: str, note: str
) -> Image.Image:
    """One sheet: real subject | before | after, below them new contexts before | after."""
    count = 9  # pictures shown per block, three by three
    prompt = plan.subject[0].prompt
    top = [
        Panel("the real subject", to_pictures(real[:count]), 3),
        Panel(f"before: “{prompt}”", to_pictures(before["subject"][:count]), 3),
        Panel(f"after: “{prompt}”", to_pictures(after["subject"][:count]), 3),
    ]
    captions = [shot.prompt for shot in plan.contexts[:10]]
    below = [
        Panel(
            f"new contexts, {when}", to_pictures(pictures["contexts"][:10]), min(5, len(captions)), captions
        )
        for when, pictures in (("before", before), ("after", after))
    ]
    return grid([top, below], title=title, note=note)


def write_pictures(folder: Path, pictures: Pictures) -> None:
    """Every picture as its own file: folder/subject-00.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, images in pictures.items():
        for index, picture in enumerate(to_pictures(images)):
            picture.save(folder / f"{kind}-{index:02d}.png")


class SubjectReport:
    """Collects the pictures of a run and writes grid.png, samples/ and run.json. For the main process."""

    def __init__(self, model: StableDiffusion, options: TrainOptions, *, autocast: torch.dtype | None):
        self.model, self.options = model, options
        self.sampler = Sampler(
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            batch_size=options.sample_batch_size,
            autocast=autocast,
        )
        self.plan = showing(
            model.family,
            options.instance_prompt,
            count=options.num_validation_images,
            validation_prompt=options.validation_prompt,
            seed=options.seed,
            measured=options.extractor is not None,
        )
        self.pictures: dict[str, Pictures] = {}

    def begin(self) -> None:
        """Writes config.yaml and draws the pictures of the untrained base."""
        write_config(self.options, self.options.output_dir)
        if self.options.num_validation_images:
            self._take("before")

    def finish(self, adapter: Adapter, *, seconds: Callable[[], float]) -> str:
        """Draws again, writes figures, grid and run.json. Returns the closing words of the run."""
        options, output, values = self.options, Path(self.options.output_dir), {}
        if options.num_validation_images:
            self._take("after")
            real = training_pictures(list_images(resolve(options.instance_data_dir)), options.resolution)
            values = self._figures(real) if options.extractor else {}
            self._grid(adapter, real).save(output / "grid.png")
        record = {
            "demo": is_embedded(options.pretrained_model_name_or_path),
            "method": str(adapter.method),
            "parameters": adapter.num_parameters,
            "steps": options.max_train_steps,
            "seconds": round(seconds(), 1),
            "figures": values,
            "options": dataclasses.asdict(options),
        }
        write_run(output / "run.json", record)
        return closing_words(options, values, seconds=record["seconds"])

    def _take(self, when: str) -> None:
        self.pictures[when] = self.plan.take(self.model.pipe, self.sampler, when=when)
        write_pictures(Path(self.options.output_dir) / "samples" / when, self.pictures[when])

    def _figures(self, real: Tensor) -> dict[str, dict[str, float]]:
        prompts = {"instance_prompt": self.options.instance_prompt, "class_prompt": self.options.class_prompt}
        return figures(
            load_clip(self.options.extractor),
            real=real,
            before=self.pictures["before"],
            after=self.pictures["after"],
            texts=context_texts(self.plan, **prompts),
        )

    def _grid(self, adapter: Adapter, real: Tensor) -> Image.Image:
        options = self.options
        title = (
            f"{adapter.method.name} on {options.pretrained_model_name_or_path}: “{options.instance_prompt}”"
        )
        note = (
            f"{len(real)} training pictures, {options.max_train_steps} steps, "
            f"{adapter.num_parameters:,} trained parameters"
        )
        if is_embedded(options.pretrained_model_name_or_path):
            title = f"DEMO · {title}"
            note += " · a small base shipped for demonstration; for real pictures name a real base"
        return comparison(
            self.plan,
            real=real,
            before=self.pictures["before"],
            after=self.pictures["after"],
            title=title,
            note=note,
        )
