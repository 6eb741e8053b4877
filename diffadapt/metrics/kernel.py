"""Kernel distance of two sets of features (KID, arXiv 1801.01401): MMD^2 with k(x, y) = (x.y / D + 1)^3."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffadapt.metrics.checks import Features, as_pair
from diffadapt.metrics.intervals import Estimate, normal_interval

ROWS = 1024  # rows of the kernel matrix held at a time


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


def _within(x: Tensor) -> _Effects:
    """Of one set with itself, without the diagonal; what stands right of it is formed once."""
    sums, squares = x.new_zeros(len(x)), x.new_zeros(())
    for start in range(0, len(x), ROWS):
        own, later = x[start : start + ROWS], x[start + ROWS :]
        block, beside = _kernel(own, own), _kernel(own, later)
        block.diagonal().zero_()
        sums[start : start + ROWS] += block.sum(dim=1) + beside.sum(dim=1)
        sums[start + ROWS :] += beside.sum(dim=0)
        squares += block.square_().sum() + 2 * beside.square_().sum()
    rows = sums / (len(x) - 1)
    return _effects(rows, rows, squares / (len(x) * (len(x) - 1)))


def _between(x: Tensor, y: Tensor) -> _Effects:
    rows, columns, squares = [], y.new_zeros(len(y)), y.new_zeros(())
    for own in x.split(ROWS):
        block = _kernel(own, y)
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
    x, y = as_pair(real, generated)
    m, n = len(x), len(y)
    xx, yy, xy = _within(x), _within(y), _between(x, y)
    variance_f = ((xx.rows - xy.rows).var() - xx.interaction / (m - 1) - xy.interaction / n).clamp(min=0)
    variance_g = ((yy.rows - xy.columns).var() - yy.interaction / (n - 1) - xy.interaction / m).clamp(min=0)
    variance = 4 * variance_f / m + 4 * variance_g / n
    variance += 2 * xx.interaction / (m * (m - 1)) + 2 * yy.interaction / (n * (n - 1))
    variance += 4 * xy.interaction / (m * n)
    return float(xx.mean + yy.mean - 2 * xy.mean), float(variance)
