"""The report of a class-conditional run: images of each class, their distance from real ones, losses."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from diffadapt.adapters.attach import attach, detach
from diffadapt.common.contact_sheet import Panel, to_pil_images
from diffadapt.common.keyed_random import permutation
from diffadapt.data.examples import Example
from diffadapt.evaluation.features.extractors import Extractor, load_extractor
from diffadapt.methods.class_embedding import ClassEmbedding
from diffadapt.metrics.digit_classifier import NAME as DIGITS
from diffadapt.metrics.digit_classifier import class_agreement
from diffadapt.metrics.evaluate import metric_value
from diffadapt.metrics.naming import score_name
from diffadapt.models.sampling import ImageRequest
from diffadapt.training.report.base import ImagesByKind, Report
from diffadapt.training.report.class_mapping import describe_class_table, find_new_table, names_by_row
from diffadapt.training.report.held_out import HeldOutLoss, center_pixels
from diffadapt.training.report.summary import MetricValues
from diffadapt.training.setup import Setup
from diffadapt.training.start_command import start_command

GRID_CLASSES = 10  # columns of a panel of the grid
GRID_ROWS = 3  # images of each class in it
LOSS_ROUNDS = 4  # noises and timesteps per image in the held-out loss


class ClassReport(Report):
    """Images and metrics of a set of classes, before and after training.

    Args:
        examples: the training images, with rows of the class table as captions.
        held_out: images for the metrics, with such captions; without any, training images are used.
        rows: row of the class table for each class of the data.
        names: of the data's classes.
    """

    def __init__(
        self,
        setup: Setup,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        *,
        rows: Sequence[int],
        names: Sequence[str],
    ):
        super().__init__(setup)
        options = self.options
        self.examples = examples
        self.rows = rows
        self.names = names
        self.is_held_out = bool(held_out)
        self.measured = sample_examples(held_out or examples, options.max_held_out_samples)
        requests = class_requests(rows, names, count=options.num_validation_images, seed=options.seed)
        self.requests = {"classes": requests}
        self._new_table = find_new_table(setup.method)
        self._accelerator = setup.accelerator
        self._loss_before: float | None = None

    def before_training(self) -> None:
        self._loss = HeldOutLoss(
            self.model,
            self.measured,
            self._accelerator,
            resolution=self.options.resolution,
            batch_size=self.options.sample_batch_size,
            rounds=LOSS_ROUNDS,
        )
        self._loss_before = self._loss.measure()
        super().before_training()

    def summary_rows(self) -> dict[str, str]:
        return {"classes": describe_class_table(self.model, self.rows)}

    def run_json_fields(self) -> dict[str, object]:
        return {"classes": names_by_row(self.names, self.rows)}

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """The base; with a new class table, the base with that table as it starts, which knows all labels."""
        with super().base_model():
            if self._new_table is None:
                yield
                return
            # The base's own table need not have the labels of the new one, which is off with its adapter.
            table = ClassEmbedding(classes=self._new_table.classes, null_class=self._new_table.null_class)
            adapter = attach(self.model.pipe, table, table.name, name="untrained")
            try:
                yield
            finally:
                detach(adapter)

    def heldout_losses(self) -> MetricValues:
        # Names of run.json, which other programs read: they stay.
        name = "held_out_loss" if self.is_held_out else "loss_on_training_pictures"
        return {name: {"before": self._loss_before, "after": self._loss.measure()}}

    def load_extractor(self) -> Extractor:
        return load_extractor(self.options.extractor)

    def metrics(self) -> MetricValues:
        image_count = len(self.requests["classes"])
        if min(image_count, len(self.measured)) < 2:  # no distance between sets of one image
            return {}
        return class_metrics(
            self.load_extractor(),
            real=center_pixels(self.measured, self.options.resolution),
            # as `class_requests` takes turns
            labels=[index % len(self.rows) for index in range(image_count)],
            before=self.images["before"],
            after=self.images["after"],
        )

    def panels(self) -> list[list[Panel]]:
        """Real, before and after below each other; in each a column per class."""
        columns = min(GRID_CLASSES, len(self.rows))
        held_out = ", held out from training" if self.is_held_out else ""
        heading = f"real{held_out}: {', '.join(self.names[:columns])}"
        panels = [[Panel(heading, to_pil_images(self._real_images(columns)), columns)]]
        for when in ("before", "after"):
            images = to_pil_images(self._generated_images(when, columns))
            panels.append([Panel(when, images, columns)])
        return panels

    def subject(self) -> str:
        return self.options.dataset_name or self.options.train_data_dir

    def data_summary(self) -> str:
        return f"{len(self.examples)} images of {len(self.rows)} classes"

    def prompt_options(self) -> str:
        rows = ",".join(map(str, self.rows[:GRID_CLASSES]))
        return f"--class_labels {rows}"

    def own_data_command(self) -> str:
        return (
            f"{start_command('class_conditional')} --adapter {shlex.quote(self.options.adapter)} "
            "--pretrained_model_name_or_path facebook/DiT-XL-2-256 --train_data_dir CLASS_FOLDERS "
            "--output_dir runs/classes"
        )

    def _generated_images(self, when: str, columns: int) -> Tensor:
        """Generated images of the first classes, a column per class: (rows x columns, 3, H, W) in [0, 1]."""
        images = self.images[when]["classes"]  # the classes in turn
        class_count = len(self.rows)
        blocks = []
        for start in range(0, min(len(images), GRID_ROWS * class_count), class_count):
            blocks.append(images[start : start + columns])
        return torch.cat(blocks)

    def _real_images(self, columns: int) -> Tensor:
        """Real images of the first classes, a column per class: (rows x columns, 3, H, W) in [0, 1]."""
        by_class = []
        for row in self.rows[:columns]:
            of_class = [example for example in self.measured if example.caption == row]
            if not of_class:
                of_class = [example for example in self.examples if example.caption == row]
            by_class.append(of_class[:GRID_ROWS])
        depth = min(len(of_class) for of_class in by_class)  # as many of each as there are of the scarcest
        grid_examples = []
        for index in range(depth):
            for of_class in by_class:
                grid_examples.append(of_class[index])
        return center_pixels(grid_examples, self.options.resolution)


def class_requests(rows: Sequence[int], names: Sequence[str], *, count: int, seed: int) -> list[ImageRequest]:
    """`count` images to generate, the classes in turn, each with its own seed.

    Args:
        rows: row of the class table for each class of the data.
        names: of the data's classes.
    """
    requests = []
    for index in range(count):
        number = index % len(rows)
        requests.append(ImageRequest(f"class {names[number]}", seed + index, rows[number]))
    return requests


def sample_examples(examples: Sequence[Example], count: int) -> list[Example]:
    """At most `count` examples, chosen at random but always the same, in their order.

    Raises:
        ValueError: the count is below 1.
    """
    if count < 1:
        raise ValueError(f"--max_held_out_samples must be at least 1, got {count}")
    # By a fixed key and not by the run's seed: runs with other seeds are measured on the same images.
    indices = sorted(permutation(("held out",), len(examples))[:count].tolist())
    return [examples[index] for index in indices]


def class_metrics(
    extractor: Extractor, *, real: Tensor, labels: Sequence[int], before: ImagesByKind, after: ImagesByKind
) -> MetricValues:
    """Frechet distance of generated from real images; of digits, the share that a classifier recognises.

    Args:
        real: (N, 3, H, W) in [0, 1].
        labels: the data's class of each generated image.
    """
    distance_name = score_name("fid", extractor.name, extractor.feature_layer)
    agreement_name = f"class_agreement[{extractor.name}]"
    reference = {"features": _features(extractor, real)[extractor.feature_layer]}
    values: MetricValues = {distance_name: {}}
    for when, images in (("before", before), ("after", after)):
        layers = _features(extractor, images["classes"])
        generated = {"features": layers[extractor.feature_layer]}
        values[distance_name][when] = metric_value("fid", real=reference, generated=generated)
        if extractor.name == DIGITS and max(labels) < layers["logits"].shape[1]:
            agreement = class_agreement(layers["logits"], torch.tensor(labels))
            values.setdefault(agreement_name, {})[when] = agreement
    return values


def _features(extractor: Extractor, images: Tensor) -> dict[str, Tensor]:
    """(N, 3, H, W) in [0, 1] to features by layer, (N, D) each."""
    return extractor((images * 255).round().to(torch.uint8))
