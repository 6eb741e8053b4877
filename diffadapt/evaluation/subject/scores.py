"""Scores of DreamBooth's protocol (arXiv 2208.12242, section 4.1): per prompt, per subject, over subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffadapt.evaluation.features.extraction import ExtractedFeatures
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.record import ImageRow, Score
from diffadapt.evaluation.scoring import kind_of
from diffadapt.evaluation.subject.layout import Layout, RealImages, Side
from diffadapt.evaluation.subject.subjects import Subject, SubjectImages
from diffadapt.metrics.copying import Nearest, copy_threshold, nearest_images
from diffadapt.metrics.diversity import group_distances
from diffadapt.metrics.intervals import proportion_interval
from diffadapt.metrics.similarity import ceiling_similarity, image_similarities, text_similarities

FIDELITY = {"clip": "clip_i", "dino": "dino"}  # kind of extractor -> its score of likeness to the subject


def score_subjects(
    label: str,
    images: Sequence[SubjectImages],
    made: ExtractedFeatures,
    real: RealImages,
    extractors: Sequence[Extractor],
    *,
    token: str,
    seed: int = 0,
) -> tuple[list[Score], list[ImageRow], dict[str, str]]:
    """Scores of one generated set, a row per image, and what was refused: score -> reason.

    Likeness to the subject (DINO, CLIP-I) has the likeness of its real images to each other as its floor.

    Args:
        made: features of `joined(images)`.
    """
    layout, nearest = Layout(label, images, real, seed), None
    scores: list[Score] = []
    refused: dict[str, str] = {}
    columns: dict[str, Tensor] = {}
    for extractor in extractors:
        if extractor.perceptual_layer is not None:
            _diversity(layout, made, extractor, scores, refused)
            continue
        rows = made.features[extractor.name][extractor.layer_of("unit")]
        key = FIDELITY[kind_of(extractor)]
        likeness = layout.by_subject(
            lambda own, ref: image_similarities(real=ref[0], generated=own), rows, extractor
        )
        scores.append(layout.score(key, extractor, likeness, floor=_ceiling(layout, extractor)))
        columns[key] = likeness
        if extractor.embed_texts is not None:
            columns["clip_t"] = text_similarities(images=rows, texts=layout.texts(extractor))
            scores.append(layout.score("clip_t", extractor, columns["clip_t"]))
        if nearest is None:
            nearest = _copies(layout, rows, extractor, scores, refused)
            columns["nearest_similarity"] = nearest[0]
    return scores, _image_rows(layout, columns, nearest, token), refused


def check_extractors(extractors: Sequence[Extractor]) -> None:
    """Raises: ValueError unless there is one of clip or dino, at most one of each, and else only lpips."""
    kinds = [kind_of(extractor) for extractor in extractors if extractor.perceptual_layer is None]
    wrong = [e.name for e in extractors if e.perceptual_layer is None and kind_of(e) not in FIDELITY]
    if wrong or not kinds or len(set(kinds)) < len(kinds):
        given = ", ".join(extractor.name for extractor in extractors) or "none"
        raise ValueError(
            f"likeness to a subject needs one clip or dino extractor, or one of each; got {given}"
        )


def _ceiling(layout: Layout, extractor: Extractor) -> float | None:
    """The real images against each other, no image with itself, over subjects that have two or more."""
    sides = [layout.real.of(own.subject, extractor)[0] for own in layout.images]
    found = [ceiling_similarity(real=rows) for rows in sides if len(rows) > 1]
    return sum(found) / len(found) if found else None


def _copies(
    layout: Layout, rows: Tensor, extractor: Extractor, scores: list[Score], refused: dict[str, str]
) -> tuple[Tensor, list[str]]:
    """Likeness and name of the nearest real image, mirrored or not, of each image; adds the copy rate."""
    names: list[str] = []

    def nearest(own: Tensor, side: Side) -> Tensor:
        found: Nearest = nearest_images(generated=own, training=side[0], mirrored=side[1])
        names.extend(side[2][row] for row in found.index.tolist())
        return found.similarity

    similarity = layout.by_subject(nearest, rows, extractor)
    try:
        limits = {own.subject.name: _copy_limit(layout, own.subject, extractor) for own in layout.images}
        beyond = similarity > torch.tensor([limits[subject.name] for subject in layout.subjects])
        hits, n = int(beyond.sum()), len(beyond)
        interval = proportion_interval(hits, n, given="the real images, generated ones as independent")
        scores.append(layout.whole_score("copy_rate", extractor, hits / n, interval, n))
    except ValueError as error:
        refused[f"{layout.label}: copy_rate"] = str(error)
    return similarity, names


def _copy_limit(layout: Layout, subject: Subject, extractor: Extractor) -> float:
    """The likeness beyond which an image is called a copy. Raises: ValueError naming the subject."""
    try:
        return copy_threshold(training=layout.real.of(subject, extractor)[0])
    except ValueError as error:
        raise ValueError(f"subject {subject.name!r}: {error}") from None


def _diversity(
    layout: Layout,
    made: ExtractedFeatures,
    extractor: Extractor,
    scores: list[Score],
    refused: dict[str, str],
) -> None:
    rows = made.features[extractor.name][extractor.perceptual_layer]
    try:
        means = group_distances(
            pixels=rows, groups=layout.groups, network=lambda a, b: (a - b).square().sum(dim=1)
        )
        scores.append(layout.grouped_score("lpips_diversity", extractor, means, len(rows)))
    except ValueError as error:
        refused[f"{layout.label}: lpips_diversity"] = str(error)


def _image_rows(
    layout: Layout, columns: Mapping[str, Tensor], nearest: tuple[Tensor, list[str]] | None, token: str
) -> list[ImageRow]:
    pictures = [picture for own in layout.images for picture in own.images]
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
