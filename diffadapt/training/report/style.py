"""The report of a style run: images of held-out captions beside the real ones, and metrics of them."""

import shlex
from collections.abc import Sequence

from torch import Tensor

from diffadapt.common.contact_sheet import Panel, to_pil_images
from diffadapt.data.batches import Batches
from diffadapt.data.examples import Example
from diffadapt.data.trigger_words import add_trigger_word
from diffadapt.metrics.evaluate import metric_value
from diffadapt.metrics.features import ClipFeatures
from diffadapt.metrics.naming import score_name
from diffadapt.metrics.similarity import paired_similarities
from diffadapt.models.sampling import ImageRequest, image_requests
from diffadapt.training.report.base import ImagesByKind, Report
from diffadapt.training.report.held_out import HeldOutLoss, center_pixels
from diffadapt.training.report.summary import MetricValues
from diffadapt.training.setup import Setup
from diffadapt.training.start_command import start_command

GRID_IMAGES = 12  # in a panel of the grid
GRID_COLUMNS = 4


class StyleReport(Report):
    """Images and metrics of a style, for captions that were not trained on or, without any, for trained ones.

    Args:
        held_out: captioned images that are not trained on.
    """

    def __init__(self, setup: Setup, batches: Batches, held_out: Sequence[Example]):
        super().__init__(setup)
        options = self.options
        count = options.num_validation_images
        self.batches = batches
        self.held_out = held_out
        self.examples: list[Example] = []  # whose captions are the prompts
        if options.validation_prompt:
            requests = image_requests(options.validation_prompt, count, seed=options.seed)
        else:
            self.examples = self._choose_examples(count)
            requests = []
            for index, example in enumerate(self.examples):
                caption = add_trigger_word(example.caption, options.trigger_word)
                requests.append(ImageRequest(caption, options.seed + index))
        self.requests = {"captions": requests}
        self._accelerator = setup.accelerator
        self._loss_before: float | None = None

    def before_training(self) -> None:
        if self.held_out:
            self._loss = HeldOutLoss(
                self.model,
                self.held_out,
                self._accelerator,
                resolution=self.options.resolution,
                batch_size=self.options.sample_batch_size,
                trigger_word=self.options.trigger_word,
                encoded_captions=self.batches.encoded_captions,
            )
            self._loss_before = self._loss.measure()
        super().before_training()

    def heldout_losses(self) -> MetricValues:
        if not self.held_out:
            return {}
        return {"held_out_loss": {"before": self._loss_before, "after": self._loss.measure()}}

    def metrics(self) -> MetricValues:
        if not self.examples:
            return {}
        # Those with the generated captions come first, for the comparison in pairs.
        other_examples = [example for example in self.held_out if example not in self.examples]
        return style_metrics(
            self.load_extractor(),
            real=center_pixels([*self.examples, *other_examples], self.options.resolution),
            examples=self.examples,
            before=self.images["before"],
            after=self.images["after"],
        )

    def panels(self) -> list[list[Panel]]:
        """Real images | their captions before | after, of the captions that `grid_rows` gives."""
        requests = self.requests["captions"]
        rows = self.grid_rows()
        captions = [requests[row].prompt for row in rows]
        panels = []
        if self.examples:
            heading = "real, held out from training" if self.held_out else "real, trained on"
            if len(rows) < len(requests) and self.options.extractor:
                heading += f", the {len(rows)} of {len(requests)} captions that the base follows best"
            real = center_pixels([self.examples[row] for row in rows], self.options.resolution)
            panels.append(Panel(heading, to_pil_images(real), GRID_COLUMNS, captions))
        for when in ("before", "after"):
            images = to_pil_images(self.images[when]["captions"][rows])
            panels.append(Panel(when, images, GRID_COLUMNS, captions))
        return [panels]

    def grid_rows(self) -> list[int]:
        """The captions that the grid shows, by number.

        These are the captions that images before training agree with best, so that one sees what they are;
        without an extractor, the first ones.
        """
        if not self.examples or not self.options.extractor:
            return list(range(min(GRID_IMAGES, len(self.requests["captions"]))))
        extractor = self.load_extractor()
        image_features = extractor.images([self.images["before"]["captions"]])  # (N, D)
        text_features = extractor.texts([str(example.caption) for example in self.examples])  # (N, D)
        # cosines, since the features have unit length
        agreement = (image_features * text_features).sum(dim=1)  # (N,)
        return agreement.argsort(descending=True)[:GRID_IMAGES].tolist()

    def subject(self) -> str:
        return self.options.dataset_name or self.options.train_data_dir

    def data_summary(self) -> str:
        return self.batches.description.splitlines()[0]

    def prompt_options(self) -> str:
        requests = self.requests["captions"]
        example = add_trigger_word("a cat", self.options.trigger_word)
        prompt = requests[0].prompt if requests else example
        return f"--prompt {shlex.quote(prompt)}"

    def own_data_command(self) -> str:
        adapter = shlex.quote(self.options.adapter)
        return (
            f"{start_command('style_transfer')} --adapter {adapter} "
            "--pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 "
            "--train_data_dir CAPTIONED_IMAGES --output_dir runs/style"
        )

    def _choose_examples(self, count: int) -> list[Example]:
        """Held-out examples at equal distances; without any, the first that are trained on."""
        if self.held_out:
            step = max(1, len(self.held_out) // max(1, count))  # the count is 0 where no images are generated
            return list(self.held_out[::step][:count])
        return self.batches.examples(range(count))


def style_metrics(
    extractor: ClipFeatures,
    *,
    real: Tensor,
    examples: Sequence[Example],
    before: ImagesByKind,
    after: ImagesByKind,
) -> MetricValues:
    """Likeness of generated images to real ones in the style; every metric names its extractor.

    Args:
        real: (N, 3, H, W) in [0, 1]; the first of them are those of `examples`.
        examples: their captions were the prompts.

    Returns:
        Mean cosine of generated images with the real ones of their captions, and with the captions (CLIP-T);
        the Frechet distance between all generated and all real images (of so few, for comparing only).
    """
    reference = extractor.images([real])  # (N, D)
    texts = extractor.texts([str(example.caption) for example in examples])
    similarity_name = f"similarity_to_real[{extractor.name}]"
    agreement_name = f"text_agreement[{extractor.name}]"
    distance_name = score_name("fid", extractor.name)
    values: MetricValues = {similarity_name: {}, agreement_name: {}, distance_name: {}}
    for when, images in (("before", before), ("after", after)):
        features = extractor.images([images["captions"]])  # (M, D), M <= N
        similarities = paired_similarities(first=features, second=reference[: len(features)])
        generated = {"features": features, "texts": texts}
        values[similarity_name][when] = float(similarities.mean())
        values[agreement_name][when] = metric_value("clip_t", generated=generated)
        values[distance_name][when] = metric_value("fid", real={"features": reference}, generated=generated)
    return values
