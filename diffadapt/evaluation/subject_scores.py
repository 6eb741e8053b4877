"""Scores of DreamBooth's protocol (arXiv 2208.12242, section 4.1): per prompt, per subject, over subjects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.evaluation.extraction import Extracted, extract
from diffadapt.evaluation.extractors import Extractor
from diffadapt.evaluation.image_sets import ImageSet, fingerprint
from diffadapt.evaluation.pictures import ArrayPicture
from diffadapt.evaluation.record import ImageRow, Score
from diffadapt.evaluation.scoring import kind_of
from diffadapt.evaluation.subjects import Subject, SubjectImages, joined
from diffadapt.metrics.copying import Nearest, copy_threshold, nearest_images
from diffadapt.metrics.diversity import group_distances
from diffadapt.metrics.intervals import Interval, cluster_means, clustered_interval, mean_interval
from diffadapt.metrics.naming import score_name
from diffadapt.metrics.registry import METRICS
from diffadapt.metrics.similarity import ceiling_similarity, image_similarities, text_similarities

FEW = 10  # subjects below which a bootstrap over them says little
FIDELITY = {"clip": "clip_i", "dino": "dino"}  # kind of extractor -> its score of likeness to the subject


@dataclass(frozen=True)
class RealImages:
    """Features of the subjects' real images, as they are and mirrored, rows in the order of the subjects."""

    subjects: tuple[Subject, ...]
    made: Extracted
    mirrored: Extracted

    @property
    def fingerprint(self) -> str:
        return fingerprint(facts.sha256 for facts in self.made.facts)

    def of(self, subject: Subject, extractor: Extractor) -> tuple[Tensor, Tensor, list[str]]:
        """Features of one subject's images, of their mirror images, and their names."""
        names = [facts.name for facts in self.made.facts]
        rows = [row for row, name in enumerate(names) if name.startswith(f"{subject.name}/")]
        both = (own.features[extractor.name][extractor.features][rows] for own in (self.made, self.mirrored))
        return *both, [names[row] for row in rows]


def real_images(subjects: Sequence[Subject], extractors: Sequence[Extractor]) -> RealImages:
    """Every real image once as it is and once mirrored: copies are found both ways."""
    pictures = [picture for subject in subjects for picture in subject.real]
    flipped = [
        ArrayPicture(p.name, p.load()[0].flip(-1).permute(1, 2, 0).contiguous().numpy()) for p in pictures
    ]
    sets = (ImageSet("real images", "folder", pictures), ImageSet("mirrored", "memory", flipped))
    return RealImages(tuple(subjects), *(extract(own, extractors, title=own.source) for own in sets))


def score_subjects(
    label: str,
    images: Sequence[SubjectImages],
    real: RealImages,
    extractors: Sequence[Extractor],
    *,
    token: str,
    seed: int = 0,
) -> tuple[list[Score], list[ImageRow], dict[str, str]]:
    """Scores of one generated set, a row per image, and what was refused: score -> reason.

    Likeness to the subject (DINO, CLIP-I) has the likeness of its real images to each other as its floor.
    """
    made = extract(joined(images, source=label, kind="memory"), extractors, title=label)
    layout = _Layout(label, images, real, seed)
    scores: list[Score] = []
    refused: dict[str, str] = {}
    columns: dict[str, Tensor] = {}
    nearest = None
    for extractor in extractors:
        if extractor.perceptual is not None:
            _diversity(layout, made, extractor, scores, refused)
            continue
        rows = made.features[extractor.name][extractor.features]
        key = FIDELITY[kind_of(extractor)]
        likeness = layout.by_subject(
            lambda own, ref: image_similarities(real=ref[0], generated=own), rows, extractor
        )
        scores.append(layout.score(key, extractor, likeness, floor=_ceiling(layout, extractor)))
        columns[key] = likeness
        if extractor.texts is not None:
            columns["clip_t"] = text_similarities(images=rows, texts=layout.texts(extractor))
            scores.append(layout.score("clip_t", extractor, columns["clip_t"]))
        if nearest is None:
            nearest = _copies(layout, rows, extractor, scores, refused)
            columns["nearest_similarity"] = nearest[0]
    return scores, _image_rows(layout, columns, nearest, token), refused


class _Layout:
    """Which row of a set belongs to which subject and prompt, and how figures of rows become a score."""

    def __init__(self, label: str, images: Sequence[SubjectImages], real: RealImages, seed: int):
        self.label, self.images, self.real, self.seed = label, images, real, seed
        self.subjects = [own.subject for own in images for _ in own.pictures]
        self.numbers = [number for own in images for number in own.numbers]
        self.groups = [(s.name, n) for s, n in zip(self.subjects, self.numbers, strict=True)]

    def by_subject(self, figure, rows: Tensor, extractor: Extractor) -> Tensor:
        """`figure(rows of a subject, (real, mirrored, names))` of every subject, joined in order."""
        parts = rows.split([len(own.pictures) for own in self.images])
        sides = [self.real.of(own.subject, extractor) for own in self.images]
        return torch.cat([figure(part, side) for part, side in zip(parts, sides, strict=True)])

    def texts(self, extractor: Extractor) -> Tensor:
        """The embedding of each image's prompt without the unique token."""
        encoded = {own.subject.name: extractor.texts(own.subject.texts()) for own in self.images}
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
        metric, values = METRICS[key], torch.tensor(list(means.values()), dtype=torch.float64)
        names = [name for name, _ in means]
        per_subject = list(cluster_means(values, names).values())
        few = len(per_subject) < FEW
        note = f"{len(per_subject)} of them: the interval says little about other subjects"
        return Score(
            score_name(metric.scores[0], extractor.name),
            key,
            self.label,
            sum(per_subject) / len(per_subject),
            _interval(values, names, self.seed),
            {"generated": n, "subjects": len(per_subject)},
            floor,
            metric.better,
            self.identity(key, extractor, n),
            (note.replace("of them", "subject" if len(per_subject) == 1 else "subjects"),) if few else (),
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
            "layer": extractor.perceptual or extractor.features,
            "reference": self.real.fingerprint,
            "options": {"protocol": "dreambooth", "prompts": digest},
            "n_generated": n,
            "n_real": len(self.real.made.facts),
            "seed": self.seed,
        }


def _interval(values: Tensor, names: Sequence[str], seed: int) -> Interval | None:
    """Over subjects; of a single subject over its prompts."""
    if len(set(names)) > 1:
        return clustered_interval(values, names, over="subjects", seed=seed)
    return mean_interval(values, over="prompts") if len(values) > 1 else None


def _ceiling(layout: _Layout, extractor: Extractor) -> float | None:
    """The real images against each other, no image with itself, over subjects that have two or more."""
    sides = [layout.real.of(own.subject, extractor)[0] for own in layout.images]
    found = [ceiling_similarity(real=rows) for rows in sides if len(rows) > 1]
    return sum(found) / len(found) if found else None


def _copies(
    layout: _Layout, rows: Tensor, extractor: Extractor, scores: list[Score], refused: dict[str, str]
) -> tuple[Tensor, list[str]]:
    """Of each image the likeness and the name of the nearest real one, mirrored or not; adds the copy rate."""
    names: list[str] = []

    def nearest(own: Tensor, side: tuple[Tensor, Tensor, list[str]]) -> Tensor:
        found: Nearest = nearest_images(generated=own, training=side[0], mirrored=side[1])
        names.extend(side[2][row] for row in found.index.tolist())
        return found.similarity

    similarity = layout.by_subject(nearest, rows, extractor)
    try:
        limits = {
            own.subject.name: copy_threshold(training=layout.real.of(own.subject, extractor)[0])
            for own in layout.images
        }
        beyond = similarity > torch.tensor([limits[subject.name] for subject in layout.subjects])
        scores.append(layout.score("copy_rate", extractor, beyond.double()))
    except ValueError as error:
        refused[f"{layout.label}: copy_rate"] = str(error)
    return similarity, names


def _diversity(
    layout: _Layout, made: Extracted, extractor: Extractor, scores: list[Score], refused: dict[str, str]
) -> None:
    rows = made.features[extractor.name][extractor.perceptual]
    try:
        means = group_distances(
            pixels=rows, groups=layout.groups, network=lambda a, b: (a - b).square().sum(dim=1)
        )
        scores.append(layout.grouped_score("lpips_diversity", extractor, means, len(rows)))
    except ValueError as error:
        refused[f"{layout.label}: lpips_diversity"] = str(error)


def _image_rows(
    layout: _Layout, columns: Mapping[str, Tensor], nearest: tuple[Tensor, list[str]] | None, token: str
) -> list[ImageRow]:
    pictures = [picture for own in layout.images for picture in own.pictures]
    seeds = [seed for own in layout.images for seed in own.seeds]
    prompts = {own.subject.name: own.subject.prompts(token) for own in layout.images}
    values = {name: column.tolist() for name, column in columns.items()}
    return [
        ImageRow(
            layout.label,
            picture.name,
            {name: column[row] for name, column in values.items()},
            None if nearest is None else nearest[1][row],
            prompt=prompts[layout.groups[row][0]][layout.groups[row][1]],
            seed=seeds[row],
        )
        for row, picture in enumerate(pictures)
    ]
