"""Inception Score: how sure a classifier is of each image, and how varied its answers are (arXiv 1606.03498).

exp(mean over images x of KL(p(y|x) || p(y))),    p(y) = mean over images of p(y|x)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from diffadapt.metrics.checks import Features, as_features
from diffadapt.metrics.intervals import (
    Estimate,
    Z,
    half_samples_interval,
    normal_interval,
    student_quantile,
)


def inception_score(*, logits: Features, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and (population) standard deviation over the splits.

    Args:
        logits: (N, classes); of Inception the layer `logits_unbiased`.
        splits: parts of about N / splits images. The score rises with the images per part.
        seed: of the shuffle before splitting, torch-fidelity's.

    Raises:
        ValueError: a split would hold fewer than two images.
    """
    scores = inception_scores(logits=logits, splits=splits, seed=seed)
    return float(scores.mean()), float(scores.std(correction=0))


def inception_scores(*, logits: Features, splits: int = 10, seed: int = 2020) -> Tensor:
    """The score of each split, (splits,)."""
    logits = as_features("logits", logits)
    if splits < 1 or len(logits) < 2 * splits:
        raise ValueError(
            f"{len(logits)} images cannot be cut into {splits} splits of at least 2; use fewer splits"
        )
    # Split i holds the shuffled images from i n / splits to (i + 1) n / splits.
    logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    ends = [i * len(logits) // splits for i in range(splits + 1)]
    return torch.stack([_score(logits[start:end]) for start, end in pairwise(ends)])


def _score(logits: Tensor) -> Tensor:
    """The score of the images of one split, ()."""
    log_p = logits.log_softmax(dim=1)  # (n, classes), log p(y|x)
    log_mean = log_p.logsumexp(dim=0) - np.log(len(logits))  # (classes,), log p(y)
    return (log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp()


def is_gap(*, real_logits: Features, generated_logits: Features, splits: int = 10, seed: int = 2020) -> float:
    """|IS(generated) - IS(real)|, lower is better: the l1 form of SuperLoRA's tables."""
    real, _ = inception_score(logits=real_logits, splits=splits, seed=seed)
    generated, _ = inception_score(logits=generated_logits, splits=splits, seed=seed)
    return abs(generated - real)


def inception_score_with_interval(*, logits: Features, splits: int = 10, seed: int = 2020) -> Estimate:
    """The mean score; the splits are independent samples, one split is judged by its random halves."""
    score = _score_with_error(as_features("logits", logits), splits, seed)
    # an error over few splits is itself uncertain: Student's t instead of the normal distribution
    quantile = Z if score.degrees is None else student_quantile(score.degrees)
    interval = normal_interval(score.value, score.error, score.method, low=1.0, quantile=quantile)
    return Estimate(score.value, interval)


def is_gap_with_interval(
    *, real_logits: Features, generated_logits: Features, splits: int = 10, seed: int = 2020
) -> Estimate:
    """`is_gap`; the errors of both sets add in squares.

    The degrees of freedom of the sum are Welch and Satterthwaite's (Biometrics Bulletin 2, 1946), rounded
    down:

        (e_r^2 + e_g^2)^2 / ((e_r^4 + e_g^4) / (splits - 1))
    """
    real = _score_with_error(as_features("real_logits", real_logits), splits, seed)
    generated = _score_with_error(as_features("generated_logits", generated_logits), splits, seed)
    gap = abs(generated.value - real.value)
    variance = generated.error**2 + real.error**2
    quantile = Z
    if generated.degrees is not None:
        fourth = generated.error**4 + real.error**4
        degrees = generated.degrees if fourth == 0 else int(generated.degrees * variance**2 / fourth)
        quantile = student_quantile(degrees)
    method = f"{generated.method}, both sets"
    return Estimate(gap, normal_interval(gap, variance**0.5, method, low=0.0, quantile=quantile))


@dataclass(frozen=True)
class _ScoreWithError:
    """A score and its standard error.

    Attributes:
        degrees: degrees of freedom of the error; None where it is not from splits.
        method: of the interval.
    """

    value: float
    error: float
    degrees: int | None
    method: str


def _score_with_error(logits: Tensor, splits: int, seed: int) -> _ScoreWithError:
    """The mean score of the splits; the error of a single split comes from random halves."""
    scores = inception_scores(logits=logits, splits=splits, seed=seed)
    value = float(scores.mean())
    if splits > 1:
        error = float(scores.std()) / splits**0.5
        return _ScoreWithError(value, error, splits - 1, f"Student's t, standard error over {splits} splits")
    halves = half_samples_interval(value, lambda rows: float(_score(logits[rows])), len(logits))
    error = (halves.high - halves.low) / 2 / Z  # the interval is value +- Z errors
    return _ScoreWithError(value, error, None, halves.method)
