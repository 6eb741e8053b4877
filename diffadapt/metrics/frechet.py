"""Frechet distance between two sets of features (FID, arXiv 1706.08500) and its limit of infinite samples.

    |mu_r - mu_g|^2 + tr S_r + tr S_g - 2 tr (S_r S_g)^(1/2)

The last trace is computed from symmetric matrices only: with factors S = F F^T it is the nuclear norm of
F_g^T F_r. Nothing is added to the diagonal, and no general matrix square root is formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diffadapt.metrics.checks import Features, as_features, refuse_unequal_widths
from diffadapt.metrics.intervals import Estimate, Interval, normal_interval

ROWS = 4096  # rows converted to float64 at a time


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set's features, and the covariance's factor, kept for every later distance.

    Attributes:
        mean: (D,), float64.
        covariance: (D, D), float64, unbiased (n - 1).
        n: number of images; None when a file of statistics does not say.
        features: (n, D) in any precision; None for imported statistics.
        note: what a reader must know of them; "" for nothing.
    """

    mean: Tensor
    covariance: Tensor
    n: int | None
    features: Tensor | None = None
    note: str = ""

    @classmethod
    def of(cls, features: Features, *, name: str = "features") -> Statistics:
        """The statistics of features (n, D); sums in float64, a block of rows at a time.

        Args:
            name: of the features in errors.
        """
        features = as_features(name, features, dtype=None)
        count, width = features.shape
        mean = sum(rows.double().sum(dim=0) for rows in features.split(ROWS)) / count
        covariance = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        for rows in features.split(ROWS):
            centred = rows.double() - mean  # (b, D)
            covariance.addmm_(centred.T, centred)
        return cls(mean, covariance / (count - 1), count, features)

    @property
    def has_fewer_rows_than_columns(self) -> bool:
        """Whether the features themselves are a smaller factor than the root of the covariance."""
        return self.features is not None and len(self.features) < len(self.mean)

    @cached_property
    def factor(self) -> Tensor:
        """F (D, p) with F F^T the covariance: the centred rows if there are few, else the symmetric root."""
        if self.has_fewer_rows_than_columns:
            return (self.features.double() - self.mean).T / (self.n - 1) ** 0.5
        values, vectors = torch.linalg.eigh(self.covariance)  # (D,), (D, D)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def fid(*, real: Features | Statistics, generated: Features | Statistics) -> float:
    """Frechet distance of two sets of features (n, D), or of their `Statistics`.

    Raises:
        ValueError: the widths differ, a feature is NaN, or there are fewer than two images.
    """
    real = as_statistics("real", real)
    generated = as_statistics("generated", generated)
    refuse_unequal_widths(len(real.mean), len(generated.mean))
    difference = real.mean - generated.mean
    traces = real.covariance.trace() + generated.covariance.trace()
    return float(difference @ difference + traces - 2 * _trace_of_root(real, generated))


def as_statistics(name: str, values: Features | Statistics) -> Statistics:
    """The statistics of features; statistics pass unchanged."""
    if isinstance(values, Statistics):
        return values
    return Statistics.of(values, name=name)


def _trace_of_root(real: Statistics, generated: Statistics) -> Tensor:
    """tr (S_r S_g)^(1/2) = |F_g^T F_r|_* = tr (F_r^T S_g F_r)^(1/2).

    By singular values when there are few rows (exact), else by eigenvalues of a symmetric matrix.
    """
    if generated.has_fewer_rows_than_columns:
        return torch.linalg.svdvals(generated.factor.T @ real.factor).sum()
    product = real.factor.T @ generated.covariance @ real.factor  # (p, p)
    return torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()


def fid_with_interval(
    *, real: Features | Statistics, generated: Features, resamples: int = 20, seed: int = 0
) -> Estimate:
    """FID and the reverse bootstrap's interval: the generated images are resampled, the reference stays.

    Resampling adds the sampling bias once more, so the interval is reflected at the value: it covers the
    distance without the sampling bias, and usually lies below the value.
    """
    real = as_statistics("real", real)
    generated = as_statistics("generated", generated)
    value = fid(real=real, generated=generated)
    generator = np.random.default_rng(seed)
    distances = []
    for _ in range(resamples):
        rows = torch.from_numpy(generator.integers(generated.n, size=generated.n))  # with replacement
        distances.append(fid(real=real, generated=Statistics.of(generated.features[rows])))
    centre = 2 * value - float(np.mean(distances))
    spread = float(np.std(distances, ddof=1))
    method = (
        f"reverse bootstrap over generated images, {resamples} resamples, normal, reference fixed; "
        "covers the distance without its sampling bias"
    )
    return Estimate(value, normal_interval(centre, spread, method, low=0.0))


def fid_infinity(
    *, real: Features | Statistics, generated: Features, seed: int = 0, sizes: int = 15, repeats: int = 2
) -> float:
    """Frechet distance extrapolated to infinitely many generated images.

    The distances of random subsets of n images are a straight line in 1/n; its value at 0 is returned. It may
    lie slightly below 0. The reference stays as it is.

    Args:
        seed: of the subsets.
        sizes: numbers of images for which subsets are drawn.
        repeats: subsets of each size.

    Raises:
        ValueError: there are fewer than 20 generated images.

    Source: Chong and Forsyth, arXiv 1911.07023, section 4.
    """
    real = as_statistics("real", real)
    generated = as_statistics("generated", generated)
    value, _ = _extrapolation(real, generated, seed, sizes, repeats)
    return value


def fid_infinity_with_interval(
    *, real: Features | Statistics, generated: Features, seed: int = 0, sizes: int = 15, repeats: int = 2
) -> Estimate:
    """`fid_infinity` and a normal interval, from the influence of each image and the scatter about the line.

    The interval is None when there are no more generated images than features: the influence needs an
    invertible covariance.
    """
    real = as_statistics("real", real)
    generated = as_statistics("generated", generated)
    value, scatter = _extrapolation(real, generated, seed, sizes, repeats)
    interval: Interval | None = None
    if generated.n > len(generated.mean):
        variance = float(influences(real=real, generated=generated).var()) / generated.n + scatter
        method = "normal; influence of each generated image and scatter of the subsets; reference fixed"
        interval = normal_interval(value, variance**0.5, method)
    return Estimate(value, interval)


def _extrapolation(
    real: Statistics, generated: Statistics, seed: int, sizes: int, repeats: int
) -> tuple[float, float]:
    """Intercept of the distances over 1/n, and its variance over the choice of subsets (sandwich form)."""
    count = generated.n
    width = len(generated.mean)
    if count < 20:
        raise ValueError(f"generated: {count} images; extrapolating the Frechet distance needs at least 20")
    smallest = max(count // 10, min(count // 2, width + 1), 5)
    generator = np.random.default_rng(seed)
    points = []  # (images of a subset, its distance)
    for size in np.linspace(smallest, count, sizes).astype(int):
        for _ in range(repeats if size < count else 1):
            rows = torch.from_numpy(generator.permutation(count)[:size])
            points.append((size, fid(real=real, generated=Statistics.of(generated.features[rows]))))
    n, distances = np.array(points).T  # (subsets,) each
    # Least squares of distance = a + b / n; the first row of the pseudo-inverse gives a.
    design = np.stack([np.ones_like(n), 1 / n], axis=1)  # (subsets, 2)
    weights = np.linalg.pinv(design)  # (2, subsets)
    residuals = distances - design @ (weights @ distances)
    scatter = float((weights[0] ** 2 * residuals**2).sum()) * len(n) / (len(n) - 2)
    return float(weights[0] @ distances), scatter


def influences(*, real: Statistics, generated: Statistics) -> Tensor:
    """First-order change of the Frechet distance per generated image, up to a constant, (n,).

        2 (mu_g - mu_r) . y + y^T (I - T) y,    y = x - mu_g,    T = F_r (F_r^T S_g F_r)^(-1/2) F_r^T

    T is never formed: with T = H H^T, y^T T y is |H^T y|^2.
    """
    root = real.factor  # (D, p)
    values, vectors = torch.linalg.eigh(root.T @ generated.covariance @ root)  # (p,), (p, p)
    is_nonzero = values > values[-1] * 1e-12
    half = (root @ vectors[:, is_nonzero]) * values[is_nonzero] ** -0.25  # (D, rank), H
    shift = 2 * (generated.mean - real.mean)  # (D,)
    blocks = []
    for rows in generated.features.split(ROWS):
        y = rows.double() - generated.mean  # (b, D)
        blocks.append(y @ shift + y.square().sum(dim=1) - (y @ half).square().sum(dim=1))
    return torch.cat(blocks)
