"""Frechet distance between two sets of features (FID, arXiv 1706.08500) and its limit of infinite samples.

    |mu_r - mu_g|^2 + tr S_r + tr S_g - 2 tr (S_r S_g)^(1/2)

The last trace is taken from symmetric matrices only: with factors S = F F^T it is the nuclear norm of
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
        mean, covariance: (D,) and (D, D), float64, unbiased (n - 1).
        n: images; None when a file of statistics does not say.
        features: (n, D) in any precision; None for imported statistics.
        note: what a reader must know of them, "" where nothing.
    """

    mean: Tensor
    covariance: Tensor
    n: int | None
    features: Tensor | None = None
    note: str = ""

    @classmethod
    def of(cls, features: Features, *, name: str = "features") -> Statistics:
        """Of (n, D) features; sums in float64, a block of rows at a time."""
        features = as_features(name, features, dtype=None)
        count, width = features.shape
        mean = sum(rows.double().sum(dim=0) for rows in features.split(ROWS)) / count
        covariance = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        for rows in features.split(ROWS):
            centred = rows.double() - mean
            covariance.addmm_(centred.T, centred)
        return cls(mean, covariance / (count - 1), count, features)

    @property
    def has_fewer_rows_than_columns(self) -> bool:
        return self.features is not None and len(self.features) < len(self.mean)

    @cached_property
    def factor(self) -> Tensor:
        """F (D, p) with F F^T the covariance: the centred rows if they are few, else the symmetric root."""
        if self.has_fewer_rows_than_columns:
            return (self.features.double() - self.mean).T / (self.n - 1) ** 0.5
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def fid(*, real: Features | Statistics, generated: Features | Statistics) -> float:
    """Frechet distance of two sets of features (n, D), or of their `Statistics`.

    Raises: ValueError for widths that differ, NaN, or fewer than two images.
    """
    real, generated = as_statistics("real", real), as_statistics("generated", generated)
    refuse_unequal_widths(len(real.mean), len(generated.mean))
    difference = real.mean - generated.mean
    traces = real.covariance.trace() + generated.covariance.trace()
    return float(difference @ difference + traces - 2 * _trace_of_root(real, generated))


def as_statistics(name: str, values: Features | Statistics) -> Statistics:
    """The statistics of features; statistics pass unchanged."""
    return values if isinstance(values, Statistics) else Statistics.of(values, name=name)


def _trace_of_root(real: Statistics, generated: Statistics) -> Tensor:
    """tr (S_r S_g)^(1/2): by singular values when rows are few (exact), else by symmetric eigenvalues."""
    if generated.has_fewer_rows_than_columns:
        return torch.linalg.svdvals(generated.factor.T @ real.factor).sum()
    product = real.factor.T @ generated.covariance @ real.factor
    return torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()


def fid_with_interval(
    *, real: Features | Statistics, generated: Features, resamples: int = 20, seed: int = 0
) -> Estimate:
    """FID and the reverse bootstrap's interval: the generated images are resampled, the reference stays.

    Resampling adds the bias once more that sampling has already added, so the interval is reflected at the
    value: it covers the distance without the sampling bias, and usually lies below the value.
    """
    real, generated = as_statistics("real", real), as_statistics("generated", generated)
    value = fid(real=real, generated=generated)
    draws, generator = [], np.random.default_rng(seed)
    for _ in range(resamples):
        rows = torch.from_numpy(generator.integers(generated.n, size=generated.n))
        draws.append(fid(real=real, generated=Statistics.of(generated.features[rows])))
    centre, spread = 2 * value - float(np.mean(draws)), float(np.std(draws, ddof=1))
    method = (
        f"reverse bootstrap over generated images, {resamples} resamples, normal, reference fixed; "
        "covers the distance without its sampling bias"
    )
    return Estimate(value, normal_interval(centre, spread, method, low=0.0))


def fid_infinity(
    *, real: Features | Statistics, generated: Features, seed: int = 0, sizes: int = 15, repeats: int = 2
) -> float:
    """Frechet distance extrapolated to infinitely many generated images (arXiv 1911.07023, section 4).

    The distances of random subsets, drawn `repeats` times for each of `sizes` sizes, are a straight line in
    1/n; its value at 0 is returned. It may lie slightly below 0. The reference stays as it is.

    Raises: ValueError for fewer than 20 generated images.
    """
    return _extrapolation(
        as_statistics("real", real), as_statistics("generated", generated), seed, sizes, repeats
    )[0]


def fid_infinity_with_interval(
    *, real: Features | Statistics, generated: Features, seed: int = 0, sizes: int = 15, repeats: int = 2
) -> Estimate:
    """`fid_infinity` and a normal interval, from the influence of each image and the scatter about the line.

    The interval is None when there are no more generated images than features: the influence needs an
    invertible covariance.
    """
    real, generated = as_statistics("real", real), as_statistics("generated", generated)
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
    count, width = generated.n, len(generated.mean)
    if count < 20:
        raise ValueError(f"generated: {count} images; extrapolating the Frechet distance needs at least 20")
    smallest = max(count // 10, min(count // 2, width + 1), 5)
    generator, points = np.random.default_rng(seed), []
    for size in np.linspace(smallest, count, sizes).astype(int):
        for _ in range(repeats if size < count else 1):
            rows = torch.from_numpy(generator.permutation(count)[:size])
            points.append((size, fid(real=real, generated=Statistics.of(generated.features[rows]))))
    n, distances = np.array(points).T
    design = np.stack([np.ones_like(n), 1 / n], axis=1)
    weights = np.linalg.pinv(design)
    residuals = distances - design @ (weights @ distances)
    scatter = float((weights[0] ** 2 * residuals**2).sum()) * len(n) / (len(n) - 2)
    return float(weights[0] @ distances), scatter


def influences(*, real: Statistics, generated: Statistics) -> Tensor:
    """First-order change of the Frechet distance per generated image, up to a constant, (n,).

    2 (mu_g - mu_r) . y + y^T (I - T) y with y = x - mu_g, T = F_r (F_r^T S_g F_r)^(-1/2) F_r^T.
    """
    root = real.factor
    values, vectors = torch.linalg.eigh(root.T @ generated.covariance @ root)
    kept = values > values[-1] * 1e-12
    half = (root @ vectors[:, kept]) * values[kept] ** -0.25
    shift = 2 * (generated.mean - real.mean)
    found = []
    for rows in generated.features.split(ROWS):
        centred = rows.double() - generated.mean
        found.append(centred @ shift + centred.square().sum(dim=1) - (centred @ half).square().sum(dim=1))
    return torch.cat(found)
