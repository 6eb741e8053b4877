"""Intervals of metrics: 95 %, each with the method that found it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
TAIL = 0.025


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and how it was found."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Estimate:
    """A metric's value and, where there is one, its interval."""

    value: float
    interval: Interval | None = None


def normal_interval(
    centre: float, standard_error: float, method: str, *, low: float = -math.inf, high: float = math.inf
) -> Interval:
    """centre +- 1.96 standard errors, cut to the metric's range."""
    ends = (centre - Z * standard_error, centre + Z * standard_error)
    return Interval(*(min(max(end, low), high) for end in ends), method)


def mean_interval(values: Tensor, *, over: str = "images") -> Interval:
    """Normal interval of the mean of independent values."""
    values = values.double()
    if len(values) < 2:
        raise ValueError(f"an interval over {over} needs at least 2 values, got {len(values)}")
    error = float(values.std()) / len(values) ** 0.5
    return normal_interval(float(values.mean()), error, f"normal, standard error over {len(values)} {over}")


def proportion_interval(hits: int, n: int, *, given: str = "") -> Interval:
    """Exact interval of a proportion (Clopper and Pearson, Biometrika 26, 1934).

    Args:
        hits: how many of `n` independent images have the property.
        given: what the proportion is conditional on.
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"{hits} of {n} is no proportion")
    at_least = _upper_tails(n)
    low = 0.0 if hits == 0 else _bisect(lambda p: at_least(hits, p) > TAIL)
    high = 1.0 if hits == n else _bisect(lambda p: 1 - at_least(hits + 1, p) < TAIL)
    return Interval(low, high, "Clopper-Pearson" + (f", given {given}" if given else ""))


def _upper_tails(n: int) -> Callable[[int, float], float]:
    """(hits, p) -> P(X >= hits) of a binomial variable X of n trials."""
    counts = torch.arange(n + 1, dtype=torch.float64)
    choices = torch.lgamma(counts[-1] + 1) - torch.lgamma(counts + 1) - torch.lgamma(n - counts + 1)
    counts, choices = counts.numpy(), choices.numpy()

    def at_least(hits: int, p: float) -> float:
        logs = choices[hits:] + counts[hits:] * math.log(p) + (n - counts[hits:]) * math.log1p(-p)
        return float(np.exp(logs).sum())

    return at_least


def _bisect(is_above: Callable[[float], bool]) -> float:
    """The probability in (0, 1) where a monotone question turns from no to yes."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return (low + high) / 2


def clustered_interval(
    values: Tensor,
    clusters: Sequence | Tensor,
    *,
    over: str = "subjects",
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over clusters of the mean of the clusters' means.

    Images of one subject (or prompt) resemble each other: only the clusters are independent.

    Args:
        values: (N,) one figure per image.
        clusters: (N,) the subject of each image, any hashable.
    Raises: ValueError for fewer than two clusters.
    """
    means = np.array(list(cluster_means(values, clusters).values()))
    if len(means) < 2:
        raise ValueError(f"a bootstrap over {over} needs at least 2 of them, got {len(means)}")
    generator = np.random.default_rng(seed)
    draws = [generator.choice(means, (100, len(means))).mean(axis=1) for _ in range(resamples // 100)]
    low, high = np.quantile(np.concatenate(draws), [TAIL, 1 - TAIL])
    method = f"bootstrap over {len(means)} {over}, {resamples // 100 * 100} resamples"
    return Interval(float(low), float(high), method)


def cluster_means(values: Tensor, clusters: Sequence | Tensor) -> dict[object, float]:
    """cluster -> mean of its values, in order of first appearance."""
    names = clusters.tolist() if isinstance(clusters, Tensor) else list(clusters)
    if len(names) != len(values):
        raise ValueError(f"{len(values)} values, but clusters of {len(names)}")
    members: dict[object, list[float]] = {}
    for name, value in zip(names, values.double().tolist(), strict=True):
        members.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in members.items()}


def half_samples_interval(
    value: float,
    of_rows: Callable[[Tensor], float],
    n: int,
    *,
    repeats: int = 20,
    seed: int = 0,
    low: float = -math.inf,
    high: float = math.inf,
) -> Interval:
    """For metrics without a theory: the spread over random halves (delete-half jackknife), about the value.

    Half of the images, drawn without replacement, vary about the whole as the whole varies about the truth;
    unlike a bootstrap no image appears twice, which would distort nearest neighbours and entropies.

    Args:
        of_rows: the metric of the images with these row numbers, (n // 2,).
    """
    generator = np.random.default_rng(seed)
    halves = [torch.from_numpy(generator.permutation(n)[: n // 2]) for _ in range(repeats)]
    spread = float(np.std([of_rows(rows) for rows in halves], ddof=1))
    return normal_interval(value, spread, f"normal, spread of {repeats} random halves", low=low, high=high)
