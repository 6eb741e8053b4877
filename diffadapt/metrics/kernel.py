"""Kernel distances of two sets of features (maximum mean discrepancy).

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

    KID (arXiv 1801.01401):   k(x, y) = (x.y / D + 1)^3
    CMMD (arXiv 2401.09603):  k(x, y) = exp(-|x - y|^2 / (2 sigma^2))

Kernel matrices are formed a block of rows at a time, so that memory grows with the number of images only.
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
    """The unbiased estimate from all pairs (U-statistic). Below 0 for sets that are very alike.

    Args:
        real, generated: (m, D), (n, D).
    """
    value, _ = discrepancy(real=real, generated=generated)
    return value


def kid_with_interval(
    *, real: Features, generated: Features, mmd: tuple[float, float] | None = None
) -> Estimate:
    """`kid` and a normal interval from the variance of the U-statistic, all terms.

    Args:
        mmd: the result of `discrepancy`, if it has been computed.
    """
    value, variance = mmd or discrepancy(real=real, generated=generated)
    return Estimate(value, normal_interval(value, variance**0.5, "normal, variance of the U-statistic"))


def kid_subsets(
    *, real: Features, generated: Features, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> float:
    """Mean over random subsets, as most papers report it; the subsets are torch-fidelity's."""
    values = kid_subset_values(real=real, generated=generated, subsets=subsets, size=size, seed=seed)
    return float(values.mean())


def kid_subset_values(
    *, real: Features, generated: Features, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> Tensor:
    """The estimate of each subset, (subsets,). Their spread is no standard error: subsets share images.

    Subsets are drawn without replacement, so that each estimate is that of all pairs on average.

    Raises:
        ValueError: a set has fewer than `size` images.

    Source: torch-fidelity, metric_kid.py: the same random numbers.
    """
    real, generated = as_pair(real, generated)
    if min(len(real), len(generated)) < size:
        raise ValueError(
            f"subsets of {size} images need as many in each set, got {len(real)} real and {len(generated)} "
            "generated; use kid, which takes all pairs, or a smaller size"
        )
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        # The generated set is drawn first, as torch-fidelity does.
        x = generated[generator.choice(len(generated), size, replace=False)]  # (size, D)
        y = real[generator.choice(len(real), size, replace=False)]  # (size, D)
        xx = _cubic_kernel(x, x)
        yy = _cubic_kernel(y, y)
        # E k(x, x') and E k(y, y') leave out each image with itself.
        within = ((xx.sum() - xx.trace()) + (yy.sum() - yy.trace())) / (size * (size - 1))
        values.append(within - 2 * _cubic_kernel(x, y).mean())
    return torch.stack(values)


def kid_subsets_with_interval(
    *, real: Features, generated: Features, mmd: tuple[float, float] | None = None, **options: int
) -> Estimate:
    """`kid_subsets` and a normal interval.

    Given the images, every subset's estimate varies about that of all pairs. So the variance of the subsets'
    mean is that of all pairs (the images might have been others) and the subsets' own over their number.

    Args:
        mmd: the result of `discrepancy`, if it has been computed.
        options: of `kid_subset_values`.
    """
    values = kid_subset_values(real=real, generated=generated, **options)
    value = float(values.mean())
    _, variance = mmd or discrepancy(real=real, generated=generated)
    choice_variance = float(values.var()) / len(values) if len(values) > 1 else 0.0
    error = (variance + choice_variance) ** 0.5
    method = "normal, variance of the U-statistic and of the choice of subsets"
    return Estimate(value, normal_interval(value, error, method))


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
    unbiased, variance, (mean_xx, mean_yy) = _discrepancy(x, y, gaussian_kernel)
    # k(x, x) = 1 is 1/m of the mean of one set with itself, the other pairs are (m - 1)/m of it.
    bias = (1 - mean_xx) / len(x) + (1 - mean_yy) / len(y)
    value = SCALE * (unbiased + bias)
    method = "normal, variance of the U-statistic, at these numbers of images"
    return Estimate(value, normal_interval(value, SCALE * variance**0.5, method, low=0.0))


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)), (m, n)."""
    squared = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
    return squared.clamp_(min=0).div_(-2 * SIGMA**2).exp_()


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3, (m, n)."""
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


@dataclass(frozen=True)
class _Effects:
    """A kernel matrix, decomposed into means and what they do not explain.

    Attributes:
        mean: of all entries, ().
        rows: means of each row, (m,).
        columns: means of each column, (n,).
        interaction: mean square of the remainder of k(x, y) without the effects of x and of y, ().
    """

    mean: Tensor
    rows: Tensor
    columns: Tensor
    interaction: Tensor


def _within(x: Tensor, kernel: Kernel) -> _Effects:
    """The effects of one set with itself, without the diagonal."""
    sums = x.new_zeros(len(x))
    squares = x.new_zeros(())
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS]  # (b, D)
        later_rows = x[start + ROWS :]
        diagonal_block = kernel(rows, rows)  # (b, b)
        right_block = kernel(rows, later_rows)  # (b, rest); by symmetry also the block below the diagonal
        diagonal_block.diagonal().zero_()
        sums[start : start + ROWS] += diagonal_block.sum(dim=1) + right_block.sum(dim=1)
        sums[start + ROWS :] += right_block.sum(dim=0)
        squares += diagonal_block.square_().sum() + 2 * right_block.square_().sum()
    row_means = sums / (len(x) - 1)
    return _effects(row_means, row_means, squares / (len(x) * (len(x) - 1)))


def _between(x: Tensor, y: Tensor, kernel: Kernel) -> _Effects:
    """The effects of two sets."""
    rows = []
    columns = y.new_zeros(len(y))
    squares = y.new_zeros(())
    for rows_of_x in x.split(ROWS):
        block = kernel(rows_of_x, y)  # (b, n)
        rows.append(block.mean(dim=1))
        columns += block.sum(dim=0)
        squares += block.square_().sum()
    return _effects(torch.cat(rows), columns / len(x), squares / (len(x) * len(y)))


def _effects(rows: Tensor, columns: Tensor, mean_square: Tensor) -> _Effects:
    """From means of rows (m,) and columns (n,) and the mean square of all entries.

    E k^2 = mean^2 + Var(rows) + Var(columns) + interaction
    """
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
    x, y = as_pair(real, generated)
    value, variance, _ = _discrepancy(x, y, _cubic_kernel)
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
    # a and b as in the equations: the images of the first set and of the other, (n, D)
    real, a = as_pair(real, first)
    _, b = as_pair(real, other)
    n = len(a)
    shift = _between(b, real, _cubic_kernel).rows - _between(a, real, _cubic_kernel).rows  # (n,) g
    sums = a.new_zeros(n)
    squares = a.new_zeros(())
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        block = _cubic_kernel(b[start:stop], b) - _cubic_kernel(a[start:stop], a)  # (b, n)
        block = block - shift[start:stop, None] - shift
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
    m = len(x)
    n = len(y)
    xx = _within(x, kernel)
    yy = _within(y, kernel)
    xy = _between(x, y, kernel)
    # Var f is that of the observed row means, less what they owe to the finite number of entries in a row.
    variance_f = ((xx.rows - xy.rows).var() - xx.interaction / (m - 1) - xy.interaction / n).clamp(min=0)
    variance_g = ((yy.rows - xy.columns).var() - yy.interaction / (n - 1) - xy.interaction / m).clamp(min=0)
    variance = 4 * variance_f / m + 4 * variance_g / n
    variance += 2 * xx.interaction / (m * (m - 1)) + 2 * yy.interaction / (n * (n - 1))
    variance += 4 * xy.interaction / (m * n)
    value = float(xx.mean + yy.mean - 2 * xy.mean)  # MMD^2
    return value, float(variance), (float(xx.mean), float(yy.mean))
