"""The report of a DreamBooth run: images of the subject, of new contexts and unrelated things; metrics."""

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
from diffadapt.training.report.base import ImagesByKind, Report
from diffadapt.training.report.summary import MetricValues
from diffadapt.training.setup import Setup
from diffadapt.training.start_command import start_command

GRID_SUBJECTS = 9  # images of the subject in a panel of the grid
GRID_SUBJECT_COLUMNS = 3
GRID_CONTEXTS = 10  # images of new contexts in a panel of the grid
GRID_CONTEXT_COLUMNS = 5


class SubjectReport(Report):
    """Images and metrics of one subject, before and after training."""

    def __init__(self, setup: Setup):
        super().__init__(setup)
        options = self.options
        self.requests = subject_requests(
            self.model.profile,
            options.instance_prompt,
            count=options.num_validation_images,
            validation_prompt=options.validation_prompt,
            seed=options.seed,
            is_measured=options.extractor is not None,
        )

    def metrics(self) -> MetricValues:
        options = self.options
        texts = []
        for request in self.requests["contexts"]:
            # an extractor does not know the identifier: "a sks dog on a beach" -> "a dog on a beach"
            text = without_identifier(
                request.prompt, instance_prompt=options.instance_prompt, class_prompt=options.class_prompt
            )
            texts.append(text)
        return subject_metrics(
            self.load_extractor(),
            real=self._real_images(),
            before=self.images["before"],
            after=self.images["after"],
            texts=texts,
        )

    def panels(self) -> list[list[Panel]]:
        """The real subject | before | after, below them new contexts before | after."""
        prompt = self.requests["subject"][0].prompt
        context_captions = [request.prompt for request in self.requests["contexts"][:GRID_CONTEXTS]]
        real = to_pil_images(self._real_images()[:GRID_SUBJECTS])
        top_row = [Panel("the real subject", real, GRID_SUBJECT_COLUMNS)]
        bottom_row = []
        for when in ("before", "after"):
            subject = to_pil_images(self.images[when]["subject"][:GRID_SUBJECTS])
            contexts = to_pil_images(self.images[when]["contexts"][:GRID_CONTEXTS])
            columns = min(GRID_CONTEXT_COLUMNS, len(context_captions))
            top_row.append(Panel(f"{when}: “{prompt}”", subject, GRID_SUBJECT_COLUMNS))
            bottom_row.append(Panel(f"new contexts, {when}", contexts, columns, context_captions))
        return [top_row, bottom_row]

    def subject(self) -> str:
        return f"“{self.options.instance_prompt}”"

    def data_summary(self) -> str:
        return f"{len(self._image_paths())} training images"

    def prompt_options(self) -> str:
        return f"--prompt {shlex.quote(self.options.instance_prompt)}"

    def own_data_command(self) -> str:
        return (
            f"{start_command('dreambooth')} --adapter {shlex.quote(self.options.adapter)} "
            "--pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 "
            "--instance_data_dir IMAGES --instance_prompt 'a photo of sks dog' --output_dir runs/dog"
        )

    def _image_paths(self) -> list[Path]:
        folder = resolve(self.options.instance_data_dir)
        return list_subject_images(folder, follow_links=self.options.follow_links)

    def _real_images(self) -> Tensor:
        """The training images, (N, 3, resolution, resolution) in [0, 1]."""
        pixels = [training_pixels(path, self.options.resolution) for path in self._image_paths()]
        return torch.stack(pixels) / 2 + 0.5  # from [-1, 1]


def subject_requests(
    profile: BaseProfile,
    instance_prompt: str,
    *,
    count: int,
    validation_prompt: str | None,
    seed: int,
    is_measured: bool,
) -> dict[str, list[ImageRequest]]:
    """The images to generate by kind: of the subject, in new contexts, and of unrelated things.

    Args:
        count: images of each kind, where all ten contexts are not measured.
        is_measured: whether metrics are made of them; unrelated prompts, and all ten contexts, are there only
            for these.
    """
    if validation_prompt is not None:
        contexts = image_requests(validation_prompt, count, seed=seed)
    else:
        prompts = context_prompts(profile.context_prompts, instance_prompt)
        # all of them for metrics, so that runs with different numbers of images can be compared
        if not is_measured:
            prompts = prompts[:count]
        contexts = _one_request_each(prompts, seed)
    return {
        "subject": image_requests(instance_prompt, count, seed=seed),
        "contexts": contexts,
        "unrelated": _one_request_each(profile.unrelated_prompts, seed) if is_measured else [],
    }


def subject_metrics(
    extractor: ClipFeatures,
    *,
    real: Tensor,
    before: ImagesByKind,
    after: ImagesByKind,
    texts: Sequence[str],
) -> MetricValues:
    """Cosines between features before and after training; every metric names its extractor.

    `subject_similarity` and `nearest_training_image` are of images of the training prompt,
    `context_similarity` and `text_agreement` of images of the context prompts. DreamBooth's likeness (arXiv
    2208.12242) is of context prompts, and so lower than that of the prompt which was trained. Likeness is
    the registry's CLIP-I, agreement its CLIP-T.

    Args:
        real: (N, 3, H, W) training images.
        texts: what the context images should show, in words the extractor knows.

    Returns:
        Metric -> {"before": ..., "after": ...}; drift has only "after".
    """
    real_features = {"unit": extractor.images([real])}  # (N, D)
    texts_features = extractor.texts(texts)
    values: MetricValues = {
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
    # images of things that have nothing to do with the subject should stay as the base makes them
    unchanged = paired_similarities(
        first=extractor.images([before["unrelated"]]),
        second=extractor.images([after["unrelated"]]),
    )
    values["drift"] = {"after": 1 - float(unchanged.mean())}
    return {f"{name}[{extractor.name}]": value for name, value in values.items()}


def _one_request_each(prompts: Sequence[str], seed: int) -> list[ImageRequest]:
    """One image of each prompt, with seeds that count up."""
    return [ImageRequest(prompt, seed + index) for index, prompt in enumerate(prompts)]
