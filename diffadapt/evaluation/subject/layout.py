"""Rows of images by subject and prompt, the subjects' real images, and how figures become one score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.evaluation.features.extraction import ExtractedFeatures, extract
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.record import Score
from diffadapt.evaluation.scoring import lpips_size
from diffadapt.evaluation.sets.image_files import ArrayImage
from diffadapt.evaluation.sets.image_sets import ImageSet, fingerprint
from diffadapt.evaluation.subject.subjects import Subject, SubjectImages
from diffadapt.metrics.intervals import Interval, cluster_means, clustered_interval, mean_interval
from diffadapt.metrics.naming import score_name
from diffadapt.metrics.registry import METRICS

Side = tuple[Tensor, Tensor, list[str]]  # a subject's real features, those mirrored, and the images' names
Figure = Callable[[Tensor, Side], Tensor]

FEW = 10  # subjects below which a bootstrap over them says little


@dataclass(frozen=True)
class RealImages:
    """Features of the subjects' real images, as they are and mirrored, rows in the order of the subjects."""

    subjects: tuple[Subject, ...]
    made: ExtractedFeatures
    mirrored: ExtractedFeatures

    @property
    def fingerprint(self) -> str:
        return fingerprint(facts.sha256 for facts in self.made.infos)

    def of(self, subject: Subject, extractor: Extractor) -> Side:
        """Features of one subject's images, of their mirror images, and their names."""
        names = [facts.name for facts in self.made.infos]
        rows = [row for row, name in enumerate(names) if name.startswith(f"{subject.name}/")]
        both = (
            own.features[extractor.name][extractor.layer_of("unit")][rows]
            for own in (self.made, self.mirrored)
        )
        return *both, [names[row] for row in rows]


def real_images(
    subjects: Sequence[Subject], extractors: Sequence[Extractor], *, skip_bad: bool = False
) -> RealImages:
    """Every real image once as it is and once mirrored: copies are found both ways.

    Args:
        skip_bad: leave unreadable images out, instead of raising.

    Raises: ValueError that lists unreadable images, or names a subject without a readable one.
    """
    pictures = [picture for subject in subjects for picture in subject.real]
    images = ImageSet("real images", "folder", pictures)
    made = extract(images, extractors, skip_bad=skip_bad, title=images.source)
    names = {facts.name for facts in made.infos}
    for subject in subjects:
        if not any(picture.name in names for picture in subject.real):
            raise ValueError(f"subject {subject.name!r} has no readable real image")
    flipped = []
    for picture in pictures:
        if picture.name in names:
            pixels = picture.load()[0].flip(-1).permute(1, 2, 0)  # (H, W, 3)
            flipped.append(ArrayImage(picture.name, pixels.contiguous().numpy()))
    mirrored = ImageSet("mirrored", "memory", flipped)
    return RealImages(tuple(subjects), made, extract(mirrored, extractors, title=mirrored.source))


class Layout:
    """Which row of a set belongs to which subject and prompt, and how figures of rows become a score."""

    def __init__(self, label: str, images: Sequence[SubjectImages], real: RealImages, seed: int):
        self.label, self.images, self.real, self.seed = label, images, real, seed
        self.subjects = [own.subject for own in images for _ in own.images]
        self.numbers = [number for own in images for number in own.numbers]
        self.groups = [(s.name, n) for s, n in zip(self.subjects, self.numbers, strict=True)]

    def by_subject(self, figure: Figure, rows: Tensor, extractor: Extractor) -> Tensor:
        """`figure(rows of a subject, (real, mirrored, names))` of every subject, joined in order."""
        parts = rows.split([len(own.images) for own in self.images])
        sides = [self.real.of(own.subject, extractor) for own in self.images]
        return torch.cat([figure(part, side) for part, side in zip(parts, sides, strict=True)])

    def texts(self, extractor: Extractor) -> Tensor:
        """The embedding of each image's prompt without the unique token."""
        encoded = {own.subject.name: extractor.embed_texts(own.subject.texts()) for own in self.images}
        return torch.stack([encoded[name][number] for name, number in self.groups]).cpu()

    def score(self, key: str, extractor: Extractor, values: Tensor, *, floor: float | None = None) -> Score:
        """The mean over prompts, then over subjects, with a bootstrap over subjects."""
        return self.grouped_score(
            key, extractor, cluster_means(values, self.groups), len(values), floor=floor
        )

    def grouped_score(
        self,
        key: str,
        extractor: Extractor,
        means: Mapping[tuple, float],
        n: int,
        *,
        floor: float | None = None,
    ) -> Score:
        """The same from the mean of each (subject, prompt)."""
        values = torch.tensor(list(means.values()), dtype=torch.float64)
        names = [name for name, _ in means]
        per_subject = list(cluster_means(values, names).values())
        value, interval = sum(per_subject) / len(per_subject), _interval(values, names, self.seed)
        return self.whole_score(key, extractor, value, interval, n, floor=floor)

    def whole_score(
        self,
        key: str,
        extractor: Extractor,
        value: float,
        interval: Interval | None,
        n: int,
        *,
        floor: float | None = None,
    ) -> Score:
        """A score of all `n` images together."""
        metric, subjects = METRICS[key], len(self.images)
        notes = []
        if subjects < FEW:
            notes.append(f"few subjects ({subjects}): the interval says little about others")
        if extractor.perceptual_layer:
            notes.append(lpips_size(extractor))
        return Score(
            score_name(metric.scores[0], extractor.name),
            key,
            self.label,
            value,
            interval,
            {"generated": n, "real": len(self.real.made.infos)},
            floor,
            metric.better,
            self.identity(key, extractor, n),
            tuple(notes),
        )

    def identity(self, key: str, extractor: Extractor, n: int) -> dict[str, object]:
        prompts = {own.subject.name: own.subject.texts() for own in self.images}
        digest = hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()
        return {
            "metric": key,
            "metric_version": METRICS[key].version,
            "extractor": extractor.name,
            "extractor_sha256": extractor.sha256,
            "preset": extractor.preset,
            "layer": extractor.perceptual_layer or extractor.layer_of("unit"),
            "reference": self.real.fingerprint,
            "options": {"protocol": "dreambooth", "prompts": digest},
            "n_generated": n,
            "n_real": len(self.real.made.infos),
            "seed": self.seed,
        }


def _interval(values: Tensor, names: Sequence[str], seed: int) -> Interval | None:
    """Over subjects; of a single subject over its prompts."""
    if len(set(names)) > 1:
        return clustered_interval(values, names, over="subjects", seed=seed)
    return mean_interval(values, over="prompts") if len(values) > 1 else None
