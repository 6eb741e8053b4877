"""Kernel distance of two sets of features (KID, arXiv 1801.01401): MMD^2 with k(x, y) = (x.y / D + 1)^3."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffadapt.metrics.checks import Features, as_pair
from diffadapt.metrics.intervals import Estimate, normal_interval

ROWS = 1024  # rows of the kernel matrix held at a time


def kid(*, real: Features, generated: Features) -> float:
    """The unbiased estimate from all pairs (U-statistic). Below 0 for sets that are very alike."""
    return _mmd(*as_pair(real, generated))[0]


def kid_with_interval(*, real: Features, generated: Features) -> Estimate:
    """`kid` and a normal interval from the variance of the U-statistic, all terms."""
    value, variance = _mmd(*as_pair(real, generated))
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


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


class _Sums:
    """Means of one kernel matrix, built a block of rows at a time.

    Attributes:
        mean, rows, columns: of all entries, of each row, of each column (off the diagonal, within one set).
        interaction: mean square of what remains of k(x, y) without the effects of x and of y.
    """

    def __init__(self, x: Tensor, y: Tensor, *, within: bool):
        rows, squares = [], torch.zeros((), dtype=x.dtype, device=x.device)
        columns = torch.zeros(len(y), dtype=x.dtype, device=x.device)
        for start in range(0, len(x), ROWS):
            values = _kernel(x[start : start + ROWS], y)
            if within:
                values.diagonal(start).zero_()
            rows.append(values.sum(dim=1))
            columns += values.sum(dim=0)
            squares += values.square_().sum()
        across, down = len(y) - within, len(x) - within
        self.rows, self.columns = torch.cat(rows) / across, columns / down
        self.mean = self.rows.mean()
        effects = (self.rows - self.mean).square().mean() + (self.columns - self.mean).square().mean()
        self.interaction = (squares / (len(x) * across) - self.mean.square() - effects).clamp(min=0)


def _mmd(x: Tensor, y: Tensor) -> tuple[float, float]:
    """MMD^2 and the variance of its estimate.

    Hoeffding's decomposition of the two-sample U-statistic: with f(x) = E k(x, x') - E k(x, y), g alike, and
    the interactions d_xx, d_yy, d_xy,

        Var = 4 Var f / m + 4 Var g / n + 2 d_xx / (m (m - 1)) + 2 d_yy / (n (n - 1)) + 4 d_xy / (m n).

    Near MMD = 0 the first two terms vanish, and the last three are the variance. Var f is that of the
    observed row means, less what they owe to the finite number of entries in a row.
    """
    m, n = len(x), len(y)
    xx, yy, xy = _Sums(x, x, within=True), _Sums(y, y, within=True), _Sums(x, y, within=False)
    variance_f = ((xx.rows - xy.rows).var() - xx.interaction / (m - 1) - xy.interaction / n).clamp(min=0)
    variance_g = ((yy.rows - xy.columns).var() - yy.interaction / (n - 1) - xy.interaction / m).clamp(min=0)
    variance = 4 * variance_f / m + 4 * variance_g / n
    variance += 2 * xx.interaction / (m * (m - 1)) + 2 * yy.interaction / (n * (n - 1))
    variance += 4 * xy.interaction / (m * n)
    return float(xx.mean + yy.mean - 2 * xy.mean), float(variance)
