"""Before and after a style run: pictures of held-out captions beside the real ones, and figures of them."""

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
from diffadapt.training.report.base import Figures, Pictures, Report
from diffadapt.training.report.held_out import HeldOutLoss, pixels_of
from diffadapt.training.setup import Setup
from diffadapt.training.start_command import start_command

SHOWN, COLUMNS = 12, 4  # pictures per block of the grid


def figures(
    extractor: ClipFeatures,
    *,
    real: Tensor,
    shown: Sequence[Example],
    before: Pictures,
    after: Pictures,
) -> Figures:
    """Likeness of generated images to real ones in the style; every figure names its extractor.

    Args:
        real: (N, 3, H, W) in [0, 1]; the first of them have the captions of the generated images.
        shown: the examples whose captions were the prompts.

    Returns: mean cosine of generated images with the real ones of their captions, and with the captions
        (CLIP-T); the Frechet distance between all generated and all real images (of so few, for comparing
        only).
    """
    reference = extractor.images([real])  # (N, D)
    texts = extractor.texts([str(example.caption) for example in shown])
    similarity_name = f"similarity_to_real[{extractor.name}]"
    agreement_name = f"text_agreement[{extractor.name}]"
    distance_name = score_name("fid", extractor.name)
    values: Figures = {similarity_name: {}, agreement_name: {}, distance_name: {}}
    for when, images in (("before", before), ("after", after)):
        features = extractor.images([images["captions"]])  # (M, D), M <= N
        similarities = paired_similarities(first=features, second=reference[: len(features)])
        generated = {"features": features, "texts": texts}
        values[similarity_name][when] = float(similarities.mean())
        values[agreement_name][when] = metric_value("clip_t", generated=generated)
        values[distance_name][when] = metric_value("fid", real={"features": reference}, generated=generated)
    return values


class StyleReport(Report):
    """Pictures and figures of a style: captions that were not trained on, or, without any, trained ones.

    Args:
        held_out: captioned pictures that are not trained on.
    """

    def __init__(self, setup: Setup, batches: Batches, held_out: Sequence[Example]):
        super().__init__(setup)
        options, self.batches, self.held_out = self.options, batches, held_out
        count, prompt = options.num_validation_images, options.validation_prompt
        self.shown = [] if prompt else self._shown(count)
        captions = [add_trigger_word(e.caption, options.trigger_word) for e in self.shown]
        self.requests = {"captions": [ImageRequest(c, options.seed + i) for i, c in enumerate(captions)]}
        if prompt:
            self.requests = {"captions": image_requests(prompt, count, seed=options.seed)}
        self._accelerator, self._losses = setup.accelerator, {}

    def before_training(self) -> None:
        if self.held_out:
            cut = {"resolution": self.options.resolution, "trigger_word": self.options.trigger_word}
            self._loss = HeldOutLoss(self.model, self.held_out, self._accelerator, **cut)
            self._losses["before"] = self._loss.measure()
        super().before_training()

    def heldout_losses(self) -> Figures:
        if not self.held_out:
            return {}
        return {"held_out_loss": {**self._losses, "after": self._loss.measure()}}

    def figures(self) -> Figures:
        if not self.shown:
            return {}
        others = [e for e in self.held_out if e not in self.shown]
        return figures(
            self.load_extractor(),
            real=pixels_of([*self.shown, *others], self.options.resolution),
            shown=self.shown,
            before=self.images["before"],
            after=self.images["after"],
        )

    def panels(self) -> list[list[Panel]]:
        """Real pictures | their captions before | after, of the captions that `chosen` gives."""
        chosen, drawn = self.chosen(), self.requests["captions"]
        captions, row = [drawn[i].prompt for i in chosen], []
        if self.shown:
            kind = "held out from training" if self.held_out else "trained on"
            few = f", the {len(chosen)} of {len(drawn)} captions that the base draws best"
            heading = f"real, {kind}" + (few if len(chosen) < len(drawn) and self.options.extractor else "")
            real = pixels_of([self.shown[i] for i in chosen], self.options.resolution)
            row.append(Panel(heading, to_pil_images(real), COLUMNS, captions))
        for when in ("before", "after"):
            row.append(Panel(when, to_pil_images(self.images[when]["captions"][chosen]), COLUMNS, captions))
        return [row]

    def chosen(self) -> list[int]:
        """Which drawn captions the grid shows: those whose pictures agree best with them before training, so
        that one sees what they are; without an extractor the first ones."""
        if not self.shown or not self.options.extractor:
            return list(range(min(SHOWN, len(self.requests["captions"]))))
        extractor = self.load_extractor()
        drawn = extractor.images([self.images["before"]["captions"]])
        agreement = (drawn * extractor.texts([str(e.caption) for e in self.shown])).sum(dim=1)
        return agreement.argsort(descending=True)[:SHOWN].tolist()

    def subject(self) -> str:
        return self.options.dataset_name or self.options.train_data_dir

    def data_summary(self) -> str:
        return self.batches.description.splitlines()[0]

    def prompt_options(self) -> str:
        drawn = self.requests["captions"]
        prompt = drawn[0].prompt if drawn else add_trigger_word("a cat", self.options.trigger_word)
        return f"--prompt {shlex.quote(prompt)}"

    def own_data_command(self) -> str:
        adapter = shlex.quote(self.options.adapter)
        return (
            f"{start_command('style_transfer')} --adapter {adapter} "
            "--pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 "
            "--train_data_dir CAPTIONED_PICTURES --output_dir runs/style"
        )

    def _shown(self, count: int) -> list[Example]:
        """The held-out examples, evenly chosen; without any, the first that are trained on."""
        if self.held_out:
            step = max(1, len(self.held_out) // max(1, count))
            return list(self.held_out[::step][:count])
        return self.batches.examples(range(count))
