"""Kernel distances of two sets of features, MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y).

KID (arXiv 1801.01401): k(x, y) = (x.y / D + 1)^3. CMMD (arXiv 2401.09603): k(x, y) = exp(-|x - y|^2 / (2
sigma^2)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffadapt.metrics.checks import Features, as_pair
from diffadapt.metrics.intervals import Estimate, normal_interval

ROWS = 1024  # rows of the kernel matrix held at a time
SIGMA = 10.0  # of CMMD's Gaussian kernel, for embeddings of length 1
SCALE = 1000.0  # CMMD is reported times this
Kernel = Callable[[Tensor, Tensor], Tensor]  # (m, D), (n, D) -> (m, n)


def kid(*, real: Features, generated: Features) -> float:
    """The unbiased estimate from all pairs (U-statistic). Below 0 for sets that are very alike."""
    return discrepancy(real=real, generated=generated)[0]


def kid_with_interval(
    *, real: Features, generated: Features, known: tuple[float, float] | None = None
) -> Estimate:
    """`kid` and a normal interval from the variance of the U-statistic, all terms.

    Args:
        known: what `discrepancy` gave, if known.
    """
    value, variance = known or discrepancy(real=real, generated=generated)
    return Estimate(value, normal_interval(value, variance**0.5, "normal, variance of the U-statistic"))


def kid_subsets(
    *, real: Features, generated: Features, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> float:
    """Mean over random subsets, as most papers report it; the subsets are torch-fidelity's."""
    return float(
        kid_subset_values(real=real, generated=generated, subsets=subsets, size=size, seed=seed).mean()
    )


def kid_subset_values(
    *, real: Features, generated: Features, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> Tensor:
    """The estimate of each subset, (subsets,). Their spread is no standard error: subsets share images.

    Torch-fidelity's subsets: drawn without replacement, so each estimate is all pairs' on average.

    Raises: ValueError when a set has fewer than `size` images.
    """
    real, generated = as_pair(real, generated)
    if min(len(real), len(generated)) < size:
        raise ValueError(
            f"subsets of {size} images need as many in each set, got {len(real)} real and {len(generated)} "
            "generated; use kid, which takes all pairs, or a smaller size"
        )
    generator, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        drawn = [rows[generator.choice(len(rows), size, replace=False)] for rows in (generated, real)]
        within = [_kernel(rows, rows) for rows in drawn]
        within = sum(matrix.sum() - matrix.trace() for matrix in within) / (size * (size - 1))
        values.append(within - 2 * _kernel(*drawn).mean())
    return torch.stack(values)


def kid_subsets_with_interval(
    *, real: Features, generated: Features, known: tuple[float, float] | None = None, **options: int
) -> Estimate:
    """`kid_subsets` and a normal interval.

    Given the images, every subset's estimate varies about that of all pairs. So the variance of the subsets'
    mean is that of all pairs (the images might have been others) and the subsets' own over their number.

    Args:
        known: what `discrepancy` gave, if known.
        options: those of `kid_subset_values`.
    """
    values = kid_subset_values(real=real, generated=generated, **options)
    of_choice = float(values.var()) / len(values) if len(values) > 1 else 0.0
    error = ((known or discrepancy(real=real, generated=generated))[1] + of_choice) ** 0.5
    method = "normal, variance of the U-statistic and of the choice of subsets"
    return Estimate(float(values.mean()), normal_interval(float(values.mean()), error, method))


def cmmd(*, real: Features, generated: Features) -> float:
    """CLIP maximum mean discrepancy: 1000 x the biased estimate (V-statistic) with the Gaussian kernel,
    sigma = 10.

        MMD^2_b = mean_ij k(x_i, x_j) + mean_ij k(y_i, y_j) - 2 mean_ij k(x_i, y_j)

    The means of one set with itself include i = j, so that two samples of one distribution are
    (1 - E k(x, x')) (1/m + 1/n) x 1000 apart on average, not 0.

    Args:
        real, generated: (m, D), (n, D) CLIP image embeddings of length 1.
    Source: Jayasumana et al., arXiv 2401.09603, and google-research/cmmd (distance.py, embedding.py).
    """
    return cmmd_with_interval(real=real, generated=generated).value


def cmmd_with_interval(*, real: Features, generated: Features) -> Estimate:
    """`cmmd` and a normal interval from the variance of the U-statistic, for sets of these sizes."""
    x, y = as_pair(real, generated)
    unbiased, variance, within = _discrepancy(x, y, gaussian_kernel)
    bias = (1 - within[0]) / len(x) + (1 - within[1]) / len(y)  # k(x, x) = 1 enters each mean 1/m times
    value = SCALE * (unbiased + bias)
    method = "normal, variance of the U-statistic, at these numbers of images"
    return Estimate(value, normal_interval(value, SCALE * variance**0.5, method, low=0.0))


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)), (m, n)."""
    squared = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
    return squared.clamp_(min=0).div_(-2 * SIGMA**2).exp_()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


@dataclass(frozen=True)
class _Effects:
    """A kernel matrix taken apart.

    Attributes:
        mean, rows, columns: means of all entries, of each row, of each column.
        interaction: mean square of what remains of k(x, y) without the effects of x and of y.
    """

    mean: Tensor
    rows: Tensor
    columns: Tensor
    interaction: Tensor


def _within(x: Tensor, kernel: Kernel) -> _Effects:
    """Of one set with itself, without the diagonal; what stands right of it is formed once."""
    sums, squares = x.new_zeros(len(x)), x.new_zeros(())
    for start in range(0, len(x), ROWS):
        own, later = x[start : start + ROWS], x[start + ROWS :]
        block, beside = kernel(own, own), kernel(own, later)
        block.diagonal().zero_()
        sums[start : start + ROWS] += block.sum(dim=1) + beside.sum(dim=1)
        sums[start + ROWS :] += beside.sum(dim=0)
        squares += block.square_().sum() + 2 * beside.square_().sum()
    rows = sums / (len(x) - 1)
    return _effects(rows, rows, squares / (len(x) * (len(x) - 1)))


def _between(x: Tensor, y: Tensor, kernel: Kernel) -> _Effects:
    rows, columns, squares = [], y.new_zeros(len(y)), y.new_zeros(())
    for own in x.split(ROWS):
        block = kernel(own, y)
        rows.append(block.mean(dim=1))
        columns += block.sum(dim=0)
        squares += block.square_().sum()
    return _effects(torch.cat(rows), columns / len(x), squares / (len(x) * len(y)))


def _effects(rows: Tensor, columns: Tensor, mean_square: Tensor) -> _Effects:
    mean = rows.mean()
    explained = mean.square() + (rows - mean).square().mean() + (columns - mean).square().mean()
    return _Effects(mean, rows, columns, (mean_square - explained).clamp(min=0))


def discrepancy(*, real: Features, generated: Features) -> tuple[float, float]:
    """MMD^2 from all pairs and the variance of this estimate.

    Hoeffding's decomposition of the two-sample U-statistic: with f(x) = E k(x, x') - E k(x, y), g alike, and
    the interactions d_xx, d_yy, d_xy,

        Var = 4 Var f / m + 4 Var g / n + 2 d_xx / (m (m - 1)) + 2 d_yy / (n (n - 1)) + 4 d_xy / (m n).

    Near MMD = 0 the first two terms vanish, and the last three are the variance. Var f is that of the
    observed row means, less what they owe to the finite number of entries in a row.
    """
    value, variance, _ = _discrepancy(*as_pair(real, generated), _kernel)
    return value, variance


def paired_kid_difference(*, real: Features, first: Features, other: Features) -> tuple[float, float]:
    """KID of `other` less KID of `first`, whose images are pairs, and its variance, the real set fixed.

    A U-statistic of the pairs z_i = (a_i, b_i), h(z_i, z_j) = k(b_i, b_j) - k(a_i, a_j) - g_i - g_j, where
    g_i = mean_r k(b_i, r) - mean_r k(a_i, r). With f_i = E h(z_i, z') and d the mean square of its
    interactions,

        Var = 4 Var f / n + 2 d / (n (n - 1)).

    Without a difference the first term vanishes. The spread over random halves of the pairs counts the second
    three times, which makes an interval up to 1.7 times too wide.

    Args:
        first, other: (n, D) features of the same prompts and seeds, in the same order.
    """
    real, a = as_pair(real, first)
    b = as_pair(real, other)[1]
    n = len(a)
    shift = _between(b, real, _kernel).rows - _between(a, real, _kernel).rows  # (n,) g
    sums = a.new_zeros(n)
    squares = a.new_zeros(())
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        block = _kernel(b[start:stop], b) - _kernel(a[start:stop], a) - shift[start:stop, None] - shift
        block.diagonal(start).zero_()
        sums[start:stop] = block.sum(dim=1)
        squares += block.square_().sum()
    rows = sums / (n - 1)
    effects = _effects(rows, rows, squares / (n * (n - 1)))
    variance = 4 * (rows.var() - effects.interaction / (n - 1)).clamp(min=0) / n
    variance += 2 * effects.interaction / (n * (n - 1))
    return float(effects.mean), float(variance)


def _discrepancy(x: Tensor, y: Tensor, kernel: Kernel) -> tuple[float, float, tuple[float, float]]:
    """The unbiased estimate, its variance, and the mean of the kernel within x and within y."""
    m, n = len(x), len(y)
    xx, yy, xy = _within(x, kernel), _within(y, kernel), _between(x, y, kernel)
    variance_f = ((xx.rows - xy.rows).var() - xx.interaction / (m - 1) - xy.interaction / n).clamp(min=0)
    variance_g = ((yy.rows - xy.columns).var() - yy.interaction / (n - 1) - xy.interaction / m).clamp(min=0)
    variance = 4 * variance_f / m + 4 * variance_g / n
    variance += 2 * xx.interaction / (m * (m - 1)) + 2 * yy.interaction / (n * (n - 1))
    variance += 4 * xy.interaction / (m * n)
    return float(xx.mean + yy.mean - 2 * xy.mean), float(variance), (float(xx.mean), float(yy.mean))
