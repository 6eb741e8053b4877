"""Before and after a subject run: the pictures that show what was learned, and figures of it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffadapt.common.contact_sheet import Panel, to_pil_images
from diffadapt.data.folders import list_subject_images
from diffadapt.data.scaled_images import training_pixels
from diffadapt.metrics.copying import nearest_images
from diffadapt.metrics.evaluate import metric_value
from diffadapt.metrics.features import ClipFeatures
from diffadapt.metrics.similarity import paired_similarities
from diffadapt.models.base import BaseProfile
from diffadapt.models.base_names import resolve
from diffadapt.models.prompts import context_prompts, without_identifier
from diffadapt.models.sampling import ImageRequest, image_requests
from diffadapt.training.report.base import Figures, Pictures, Report
from diffadapt.training.setup import Setup
from diffadapt.training.start_command import start_command

SHOWN_SUBJECTS, SHOWN_CONTEXTS = 9, 10  # pictures per block of the grid


def showing(
    profile: BaseProfile,
    instance_prompt: str,
    *,
    count: int,
    validation_prompt: str | None,
    seed: int,
    measured: bool,
) -> dict[str, list[ImageRequest]]:
    """The shots of a run by kind: of the subject, in new contexts, and of unrelated things.

    Unrelated prompts, and all ten contexts, are there only when figures are made of them.
    """
    if validation_prompt is not None:
        context_shots = image_requests(validation_prompt, count, seed=seed)
    else:
        prompts = context_prompts(profile.context_prompts, instance_prompt)
        prompts = prompts if measured else prompts[:count]
        context_shots = [ImageRequest(prompt, seed + i) for i, prompt in enumerate(prompts)]
    unrelated = (
        [ImageRequest(prompt, seed + i) for i, prompt in enumerate(profile.unrelated_prompts)]
        if measured
        else []
    )
    return {
        "subject": image_requests(instance_prompt, count, seed=seed),
        "contexts": context_shots,
        "unrelated": unrelated,
    }


def figures(
    extractor: ClipFeatures,
    *,
    real: Tensor,
    before: Pictures,
    after: Pictures,
    texts: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Cosines between features before and after training; every figure names its extractor.

    `subject_similarity` and `nearest_training_image` are of images of the training prompt,
    `context_similarity` and `text_agreement` of images of the context prompts. DreamBooth's likeness (arXiv
    2208.12242) is of context prompts, and so lower than that of the prompt which was trained. Likeness is
    the registry's CLIP-I, agreement its CLIP-T.

    Args:
        real: (N, 3, H, W) training images.
        texts: what the context images should show, in words the extractor knows.

    Returns: figure -> {"before": ..., "after": ...}; drift has only "after".
    """
    real_features = {"unit": extractor.images([real])}  # (N, D)
    texts_features = extractor.texts(texts)
    values: dict[str, dict[str, float]] = {
        "subject_similarity": {},
        "context_similarity": {},
        "text_agreement": {},
        "nearest_training_image": {},
    }
    for when, images in (("before", before), ("after", after)):
        subject = {"unit": extractor.images([images["subject"]])}
        contexts = {"unit": extractor.images([images["contexts"]]), "texts": texts_features}
        nearest = nearest_images(training=real_features["unit"], generated=subject["unit"])
        values["subject_similarity"][when] = metric_value("clip_i", real=real_features, generated=subject)
        values["context_similarity"][when] = metric_value("clip_i", real=real_features, generated=contexts)
        values["text_agreement"][when] = metric_value("clip_t", generated=contexts)
        values["nearest_training_image"][when] = float(nearest.similarity.mean())
    unchanged = paired_similarities(
        first=extractor.images([before["unrelated"]]),
        second=extractor.images([after["unrelated"]]),
    )
    values["drift"] = {"after": 1 - float(unchanged.mean())}
    return {f"{name}[{extractor.name}]": value for name, value in values.items()}


def training_pictures(paths: Sequence[Path], resolution: int) -> Tensor:
    """(N, 3, resolution, resolution) in [0, 1]."""
    return torch.stack([training_pixels(path, resolution) / 2 + 0.5 for path in paths])


class SubjectReport(Report):
    """Pictures and figures of one subject: as trained, in new contexts, and of unrelated things."""

    def __init__(self, setup: Setup):
        super().__init__(setup)
        options = self.options
        self.requests = showing(
            self.model.profile,
            options.instance_prompt,
            count=options.num_validation_images,
            validation_prompt=options.validation_prompt,
            seed=options.seed,
            measured=options.extractor is not None,
        )

    def figures(self) -> Figures:
        prompts = {"instance_prompt": self.options.instance_prompt, "class_prompt": self.options.class_prompt}
        return figures(
            self.load_extractor(),
            real=self._real(),
            before=self.images["before"],
            after=self.images["after"],
            texts=[without_identifier(shot.prompt, **prompts) for shot in self.requests["contexts"]],
        )

    def panels(self) -> list[list[Panel]]:
        """The real subject | before | after, below them new contexts before | after."""
        prompt = self.requests["subject"][0].prompt
        captions = [shot.prompt for shot in self.requests["contexts"][:SHOWN_CONTEXTS]]
        top, below = [Panel("the real subject", to_pil_images(self._real()[:SHOWN_SUBJECTS]), 3)], []
        for when in ("before", "after"):
            drawn, elsewhere = (self.images[when][kind] for kind in ("subject", "contexts"))
            top.append(Panel(f"{when}: “{prompt}”", to_pil_images(drawn[:SHOWN_SUBJECTS]), 3))
            pictures, columns = to_pil_images(elsewhere[:SHOWN_CONTEXTS]), min(5, len(captions))
            below.append(Panel(f"new contexts, {when}", pictures, columns, captions))
        return [top, below]

    def subject(self) -> str:
        return f"“{self.options.instance_prompt}”"

    def data_summary(self) -> str:
        return f"{len(self._paths())} training pictures"

    def prompt_options(self) -> str:
        return f"--prompt {shlex.quote(self.options.instance_prompt)}"

    def own_data_command(self) -> str:
        return (
            f"{start_command('dreambooth')} --adapter {shlex.quote(self.options.adapter)} "
            "--pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 "
            "--instance_data_dir PICTURES --instance_prompt 'a photo of sks dog' --output_dir runs/dog"
        )

    def _paths(self) -> list[Path]:
        folder = resolve(self.options.instance_data_dir)
        return list_subject_images(folder, follow_links=self.options.follow_links)

    def _real(self) -> Tensor:
        return training_pictures(self._paths(), self.options.resolution)
