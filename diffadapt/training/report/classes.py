"""Before and after a class-conditional run: pictures of each class, their distance from real ones, loss."""

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
from diffadapt.training.report.base import Figures, Pictures, Report
from diffadapt.training.report.class_mapping import class_names, new_table, table_note
from diffadapt.training.report.held_out import HeldOutLoss, pixels_of
from diffadapt.training.setup import Setup
from diffadapt.training.start_command import start_command

SHOWN_CLASSES, SHOWN_EACH = 10, 3  # columns and rows of each block of the grid
LOSS_ROUNDS = 4  # noises and timesteps per picture in the held-out loss


def class_shots(rows: Sequence[int], names: Sequence[str], *, count: int, seed: int) -> list[ImageRequest]:
    """`count` pictures, the classes in turn, each with its own seed.

    Args:
        rows: the base's class for each class of the data.
        names: of the data's classes.
    """
    turns = [index % len(rows) for index in range(count)]
    return [ImageRequest(f"class {names[k]}", seed + index, rows[k]) for index, k in enumerate(turns)]


def at_most(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of them, chosen at random but always the same, in their order.

    Raises: ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"--max_held_out_samples must be at least 1, got {count}")
    chosen = sorted(permutation(("held out",), len(examples))[:count].tolist())
    return [examples[index] for index in chosen]


def figures(
    extractor: Extractor, *, real: Tensor, labels: Sequence[int], before: Pictures, after: Pictures
) -> Figures:
    """Frechet distance of generated from real images; of digits, the share that a classifier recognises.

    Args:
        real: (N, 3, H, W) in [0, 1].
        labels: the data's class of each generated image.
    """
    distance_name = score_name("fid", extractor.name, extractor.feature_layer)
    agreement_name = f"class_agreement[{extractor.name}]"
    reference = {"features": _features(extractor, real)[extractor.feature_layer]}
    values: Figures = {distance_name: {}}
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


class ClassReport(Report):
    """Pictures and figures of a set of classes.

    Args:
        examples: the training pictures, with the base's classes as captions.
        held_out: pictures the figures are made of, likewise; without any, training pictures are used.
        rows: the base's class for each class of the data.
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
        self.examples, self.rows, self.names = examples, rows, names
        self.measured = at_most(held_out or examples, self.options.max_held_out_samples)
        self.is_held_out = bool(held_out)
        count, seed = self.options.num_validation_images, self.options.seed
        self._new_table = new_table(setup.method)
        self.requests = {"classes": class_shots(rows, names, count=count, seed=seed)}
        self._accelerator, self._losses = setup.accelerator, {}

    def before_training(self) -> None:
        cut = {"resolution": self.options.resolution, "rounds": LOSS_ROUNDS}
        self._loss = HeldOutLoss(self.model, self.measured, self._accelerator, **cut)
        self._losses["before"] = self._loss.measure()
        super().before_training()

    def summary_rows(self) -> dict[str, str]:
        return {"classes": table_note(self.model, self.rows)}

    def run_json_fields(self) -> dict[str, object]:
        return {"classes": class_names(self.names, self.rows)}

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """The base; with a new class table the base with that table as it starts, which knows all labels."""
        with super().base_model():
            if self._new_table is None:
                yield
                return
            start = ClassEmbedding(classes=self._new_table.classes, null_class=self._new_table.null_class)
            adapter = attach(self.model.pipe, start, start.name, name="untrained")
            try:
                yield
            finally:
                detach(adapter)

    def heldout_losses(self) -> Figures:
        which = "held_out_loss" if self.is_held_out else "loss_on_training_pictures"
        return {which: {**self._losses, "after": self._loss.measure()}}

    def load_extractor(self) -> Extractor:
        return load_extractor(self.options.extractor)

    def figures(self) -> Figures:
        count, drawn = len(self.rows), len(self.requests["classes"])
        if min(drawn, len(self.measured)) < 2:  # no distance between sets of one picture
            return {}
        return figures(
            self.load_extractor(),
            real=pixels_of(self.measured, self.options.resolution),
            labels=[index % count for index in range(drawn)],
            before=self.images["before"],
            after=self.images["after"],
        )

    def panels(self) -> list[list[Panel]]:
        """Real, before and after below each other; in each a column per class."""
        shown = min(SHOWN_CLASSES, len(self.rows))
        which = ", held out from training" if self.is_held_out else ""
        blocks = {f"real{which}: {', '.join(self.names[:shown])}": self._real_block(shown)}
        for when in ("before", "after"):
            drawn = self.images[when]["classes"]
            turns = range(0, min(len(drawn), SHOWN_EACH * len(self.rows)), len(self.rows))
            blocks[when] = torch.cat([drawn[turn : turn + shown] for turn in turns])
        return [[Panel(heading, to_pil_images(block), shown)] for heading, block in blocks.items()]

    def subject(self) -> str:
        return self.options.dataset_name or self.options.train_data_dir

    def data_summary(self) -> str:
        return f"{len(self.examples)} pictures of {len(self.rows)} classes"

    def prompt_options(self) -> str:
        return f"--class_labels {','.join(map(str, self.rows[:SHOWN_CLASSES]))}"

    def own_data_command(self) -> str:
        return (
            f"{start_command('class_conditional')} --adapter {shlex.quote(self.options.adapter)} "
            "--pretrained_model_name_or_path facebook/DiT-XL-2-256 --train_data_dir CLASS_FOLDERS "
            "--output_dir runs/classes"
        )

    def _real_block(self, shown: int) -> Tensor:
        """(rows x shown, 3, H, W) in [0, 1]: real pictures, a column per class."""
        columns = []
        for row in self.rows[:shown]:
            found = [e for e in self.measured if e.caption == row]
            columns.append((found or [e for e in self.examples if e.caption == row])[:SHOWN_EACH])
        depth = min(map(len, columns))  # as many of each class as there are of the scarcest
        return pixels_of([some[i] for i in range(depth) for some in columns], self.options.resolution)
