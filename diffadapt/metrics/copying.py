"""Are generated images copies of training images? The nearest by cosine, mirrored ones included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffadapt.metrics.checks import Features, as_features, as_pair

SAME_IMAGE = 0.9999  # cosine from which two training images are one picture
ROWS = 1024  # rows of the matrix of cosines held at a time


class Nearest(NamedTuple):
    """Of each generated image (M,): cosine to the nearest training image, its row, whether it is mirrored."""

    similarity: Tensor
    index: Tensor
    is_mirrored: Tensor


def nearest_images(*, generated: Features, training: Features, mirrored: Features | None = None) -> Nearest:
    """The nearest training image of each generated one.

    Args:
        generated, training: (M, D), (N, D) features of one layer.
        mirrored: (N, D) features of the training images flipped left to right, in the same order. A flipped
            copy is found only with them.
    """
    training, generated = as_pair(training, generated, least=1)
    sides = [training] if mirrored is None else [training, _mirror_of(training, mirrored)]
    sides = [normalize(side, dim=1) for side in sides]
    blocks = [_nearest(rows, sides) for rows in normalize(generated, dim=1).split(ROWS)]
    return Nearest(*(torch.cat(columns) for columns in zip(*blocks, strict=True)))


def _nearest(generated: Tensor, sides: Sequence[Tensor]) -> Nearest:
    """The same of some unit vectors, among those as they are and those mirrored."""
    found = [(generated @ side.T).max(dim=1) for side in sides]
    similarity, side = torch.stack([each.values for each in found]).max(dim=0)
    index = torch.stack([each.indices for each in found]).gather(0, side[None])[0]
    return Nearest(similarity, index, side == 1)


def copy_rate(
    *,
    generated: Features,
    training: Features,
    mirrored: Features | None = None,
    threshold: float | None = None,
) -> float:
    """Share of generated images that are nearer to a training image than `threshold`.

    Args:
        threshold: a cosine; None takes `copy_threshold` of the training images.
    """
    return float(
        copies(generated=generated, training=training, mirrored=mirrored, threshold=threshold).double().mean()
    )


def copies(
    *,
    generated: Features,
    training: Features,
    mirrored: Features | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Whether each generated image is a copy in the sense of `copy_rate`, (M,) bool."""
    limit = copy_threshold(training=training) if threshold is None else threshold
    if not -1 <= limit <= 1:
        raise ValueError(f"threshold={limit}: a cosine lies in [-1, 1]")
    return nearest_images(generated=generated, training=training, mirrored=mirrored).similarity > limit


def copy_threshold(*, training: Features) -> float:
    """The largest cosine between two training images that are not the same picture.

    A generated image beyond it resembles a training image more than any other photograph of the subject does.
    """
    rows = normalize(as_features("training", training), dim=1)
    blocks = (own @ rows.T for own in rows.split(ROWS))
    largest = max(float(cosines.masked_fill_(cosines >= SAME_IMAGE, -math.inf).max()) for cosines in blocks)
    if largest == -math.inf:
        raise ValueError(
            "training: all images are the same picture, so no threshold follows from them; give one"
        )
    return largest


def _mirror_of(training: Tensor, mirrored: Features) -> Tensor:
    mirrored = as_features("mirrored", mirrored, least=1)
    if mirrored.shape != training.shape:
        raise ValueError(
            f"mirrored: expected {tuple(training.shape)}, the shape of training, got {tuple(mirrored.shape)}"
        )
    return mirrored
