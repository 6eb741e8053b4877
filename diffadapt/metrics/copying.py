"""Copies of training images among generated ones: the nearest by cosine, mirrored ones included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffadapt.metrics.checks import Features, as_features, as_pair

SAME_IMAGE = 0.9999  # cosine from which two training images are the same image
ROWS = 1024  # rows of the matrix of cosines held at a time


class Nearest(NamedTuple):
    """The nearest training image of each generated one.

    Attributes:
        similarity: cosine to it, (M,) float64.
        index: its row, (M,).
        is_mirrored: whether its mirror image is the nearer one, (M,) bool.
    """

    similarity: Tensor
    index: Tensor
    is_mirrored: Tensor


def nearest_images(*, training: Features, generated: Features, mirrored: Features | None = None) -> Nearest:
    """The nearest training image of each generated one.

    Args:
        training, generated: (N, D), (M, D) features of one layer.
        mirrored: (N, D) features of the training images flipped left to right, in the same order. A flipped
            copy is found only with them.
    """
    training, generated = as_pair(training, generated, min_rows=1)
    # a mirrored copy is near to the mirrored training image, not to the image itself
    sides = [normalize(training, dim=1)]
    if mirrored is not None:
        sides.append(normalize(_checked_mirror(training, mirrored), dim=1))
    blocks = [_nearest_of_block(rows, sides) for rows in normalize(generated, dim=1).split(ROWS)]
    similarities, indices, are_mirrored = zip(*blocks, strict=True)
    return Nearest(torch.cat(similarities), torch.cat(indices), torch.cat(are_mirrored))


def _nearest_of_block(generated: Tensor, sides: Sequence[Tensor]) -> Nearest:
    """The nearest of some images.

    Args:
        generated: (b, D), of length 1.
        sides: training images as they are and, if known, mirrored, (N, D) each, of length 1.
    """
    similarities = []
    indices = []
    for side in sides:
        cosines = generated @ side.T  # (b, N)
        largest = cosines.max(dim=1)
        similarities.append(largest.values)
        indices.append(largest.indices)
    similarity, side_number = torch.stack(similarities).max(dim=0)  # (b,) over the sides
    index = torch.stack(indices).gather(0, side_number[None])[0]
    return Nearest(similarity, index, side_number == 1)


def copy_rate(
    *,
    training: Features,
    generated: Features,
    mirrored: Features | None = None,
    threshold: float | None = None,
) -> float:
    """Share of generated images that are nearer to a training image than `threshold`.

    Args:
        threshold: a cosine; None takes `copy_threshold` of the training images.
    """
    is_copy = copies(training=training, generated=generated, mirrored=mirrored, threshold=threshold)
    return float(is_copy.double().mean())


def copies(
    *,
    training: Features,
    generated: Features,
    mirrored: Features | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Whether each generated image is a copy in the sense of `copy_rate`, (M,) bool."""
    limit = copy_threshold(training=training) if threshold is None else threshold
    if not -1 <= limit <= 1:
        raise ValueError(f"threshold={limit}: a cosine lies in [-1, 1]")
    nearest = nearest_images(training=training, generated=generated, mirrored=mirrored)
    return nearest.similarity > limit


def copy_threshold(*, training: Features) -> float:
    """The largest cosine between two training images that are not the same image.

    A generated image beyond it resembles a training image more than any other photograph of the subject does.
    """
    features = normalize(as_features("training", training), dim=1)  # (N, D)
    largest = -math.inf
    for rows in features.split(ROWS):
        cosines = rows @ features.T  # (b, N)
        cosines.masked_fill_(cosines >= SAME_IMAGE, -math.inf)  # each image with itself, and repeats
        largest = max(largest, float(cosines.max()))
    if largest == -math.inf:
        raise ValueError(
            "training: all images are the same picture, so no threshold follows from them; give one"
        )
    return largest


def _checked_mirror(training: Tensor, mirrored: Features) -> Tensor:
    mirrored = as_features("mirrored", mirrored, min_rows=1)
    if mirrored.shape != training.shape:
        raise ValueError(
            f"mirrored: expected {tuple(training.shape)}, the shape of training, got {tuple(mirrored.shape)}"
        )
    return mirrored
