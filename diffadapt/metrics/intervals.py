"""95 % intervals of metrics, each with the name of its method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
TAIL = 0.025
FEW_CLUSTERS = 30  # below, a percentile bootstrap over clusters is too narrow: at 10 it covers 90 %


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and the method by which it was computed."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Estimate:
    """A metric's value and, where there is one, its interval."""

    value: float
    interval: Interval | None = None


def normal_interval(
    centre: float,
    standard_error: float,
    method: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    quantile: float = Z,
) -> Interval:
    """centre +- `quantile` standard errors, cut to the metric's range `low` to `high`."""
    lower_end = centre - quantile * standard_error
    upper_end = centre + quantile * standard_error
    return Interval(min(max(lower_end, low), high), min(max(upper_end, low), high), method)


def student_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t distribution, which replaces 1.96 where the error rests on few values.

    Args:
        degrees: degrees of freedom, at least 1; rounding them down errs on the wide side.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4: with
        theta = atan(t / sqrt(degrees)), P(|T| <= t) is a finite sum of powers of cos(theta).
    """
    if degrees < 1:
        raise ValueError(f"Student's t distribution needs at least 1 degree of freedom, got {degrees}")
    low = 0.0
    high = math.pi / 2
    for _ in range(60):  # bisection for theta, to the last bit
        middle = (low + high) / 2
        if _student_central_mass(middle, degrees) < 1 - 2 * TAIL:
            low = middle
        else:
            high = middle
    return math.tan((low + high) / 2) * degrees**0.5


def _student_central_mass(theta: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(theta)).

    Odd degrees:  2/pi (theta + sin (cos + 2/3 cos^3 + ... + (2 4 ... (degrees - 3)) / (3 5 ... (degrees - 2)) cos^(degrees - 2)))
    Even degrees: sin (1 + 1/2 cos^2 + ... + (1 3 ... (degrees - 3)) / (2 4 ... (degrees - 2)) cos^(degrees - 2))
    """  # noqa: E501
    # `term` runs through the powers of the sum, each from the last by (power - 1) / power cos^2
    is_odd = degrees % 2 == 1
    cosine = math.cos(theta)
    term = cosine if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for power in range(3 if is_odd else 2, degrees - 1, 2):
        term *= (power - 1) / power * cosine**2
        total += term
    mass = math.sin(theta) * total
    return 2 / math.pi * (theta + mass) if is_odd else mass


def mean_interval(
    values: Tensor, *, over: str = "images", low: float = -math.inf, high: float = math.inf
) -> Interval:
    """Student's t interval of the mean of independent values, cut to the range `low` to `high`.

    Args:
        values: (N,).
        over: what the values are of, in the name of the method.
    """
    values = values.double()
    if len(values) < 2:
        raise ValueError(f"an interval over {over} needs at least 2 values, got {len(values)}")
    error = float(values.std()) / len(values) ** 0.5
    quantile = student_quantile(len(values) - 1)
    method = f"Student's t, standard error over {len(values)} {over}"
    return normal_interval(float(values.mean()), error, method, low=low, high=high, quantile=quantile)


def proportion_interval(hits: int, n: int, *, condition: str = "") -> Interval:
    """Exact interval of a proportion (Clopper and Pearson, Biometrika 26, 1934).

    Args:
        hits: how many of `n` independent images have the property.
        condition: what the proportion is conditional on, in the name of the method.
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"{hits} of {n} is no proportion")
    at_least = _upper_tails(n)
    low = 0.0
    if hits > 0:  # the p under which as many hits have a probability of 2.5 %
        low = _bisect(lambda p: at_least(hits, p) > TAIL)
    high = 1.0
    if hits < n:  # the p under which as few hits have a probability of 2.5 %
        high = _bisect(lambda p: 1 - at_least(hits + 1, p) < TAIL)
    method = "Clopper-Pearson"
    if condition:
        method += f", given {condition}"
    return Interval(low, high, method)


def _upper_tails(n: int) -> Callable[[int, float], float]:
    """(hits, p) -> P(X >= hits) of a binomial variable X of n trials.

    P(X = k) = n! / (k! (n - k)!) p^k (1 - p)^(n - k)
    """
    # in logarithms, as n! overflows from n = 171 on; numpy has no lgamma
    k = torch.arange(n + 1, dtype=torch.float64)
    log_choices = torch.lgamma(k[-1] + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    k = k.numpy()  # (n + 1,)
    log_choices = log_choices.numpy()  # (n + 1,)

    def at_least(hits: int, p: float) -> float:
        logs = log_choices[hits:] + k[hits:] * math.log(p) + (n - k[hits:]) * math.log1p(-p)
        return float(np.exp(logs).sum())

    return at_least


def _bisect(is_above: Callable[[float], bool]) -> float:
    """The probability in (0, 1) where a monotone condition turns from false to true."""
    low = 0.0
    high = 1.0
    for _ in range(60):  # to the last bit of float64
        middle = (low + high) / 2
        if is_above(middle):
            high = middle
        else:
            low = middle
    return (low + high) / 2


def clustered_interval(
    values: Tensor,
    clusters: Sequence | Tensor,
    *,
    over: str = "subjects",
    resamples: int = 10_000,
    seed: int = 0,
    low: float = -math.inf,
    high: float = math.inf,
) -> Interval:
    """Percentile bootstrap over clusters of the mean of their means; Student's t below 30 clusters.

    Images of one subject (or prompt) resemble each other: only the clusters are independent. The bootstrap of
    few clusters is too narrow (of 2, 3 and 5 clusters it covers the truth in 55, 73 and 88 % of simulated
    sets), Student's t interval over their means is not.

    Args:
        values: (N,) one number per image.
        clusters: (N,) the subject of each image, any hashable.
        over: what the clusters are, in the name of the method.
        low, high: range of the numbers, to which Student's t interval is cut.

    Raises:
        ValueError: there are fewer than two clusters.
    """
    means = np.array(list(cluster_means(values, clusters).values()))
    if len(means) < 2:
        raise ValueError(f"an interval over {over} needs at least 2 of them, got {len(means)}")
    if len(means) < FEW_CLUSTERS:
        return mean_interval(torch.from_numpy(means), over=over, low=low, high=high)
    generator = np.random.default_rng(seed)
    rounds = resamples // 100
    resampled_means = []
    for _ in range(rounds):  # 100 at a time, which bounds the memory
        resampled_means.append(generator.choice(means, (100, len(means))).mean(axis=1))
    lower_end, upper_end = np.quantile(np.concatenate(resampled_means), [TAIL, 1 - TAIL])
    method = f"bootstrap over {len(means)} {over}, {100 * rounds} resamples"
    return Interval(float(lower_end), float(upper_end), method)


def cluster_means(values: Tensor, clusters: Sequence | Tensor) -> dict[object, float]:
    """Mean of the values of each cluster, clusters in order of first appearance.

    Args:
        values: (N,).
        clusters: (N,), any hashable.

    Returns:
        Cluster -> mean.
    """
    names = clusters.tolist() if isinstance(clusters, Tensor) else list(clusters)
    if len(names) != len(values):
        raise ValueError(f"{len(values)} values, but clusters of {len(names)}")
    members: dict[object, list[float]] = {}
    for name, value in zip(names, values.double().tolist(), strict=True):
        members.setdefault(name, []).append(value)
    means = {}
    for name, cluster in members.items():
        means[name] = sum(cluster) / len(cluster)
    return means


def half_samples_interval(
    value: float,
    of_rows: Callable[[Tensor], float],
    n: int,
    *,
    repeats: int = 20,
    seed: int = 0,
    low: float = -math.inf,
    high: float = math.inf,
    clusters: Sequence | None = None,
    over: str = "",
) -> Interval:
    """An interval for metrics without a theory: the spread over random halves, about the value.

    The metric of half of the images, drawn without replacement, varies about the metric of all as that varies
    about the truth (delete-half jackknife); unlike in a bootstrap no image appears twice, which would distort
    nearest neighbours and entropies.

    Of G independent units h are drawn; for an odd G the variance is brought from 1/h - 1/G to 1/G.

    Args:
        of_rows: the metric of the images with these row numbers.
        n: number of images.
        repeats: number of halves.
        clusters: (n,) the prompt, say, of each image; then halves of the clusters are drawn.
        over: what the clusters are, in the name of the method.

    Raises:
        ValueError: there are fewer than two clusters, or the metric of a half raises it.
    """
    generator = np.random.default_rng(seed)
    names = range(n) if clusters is None else clusters
    members: dict[object, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    units = list(members.values())
    if len(units) < 2:
        raise ValueError(f"halves of {over or 'images'} need at least 2 of them, got {len(units)}")
    half = len(units) // 2
    values = []
    for _ in range(repeats):
        rows: list[int] = []
        for unit in generator.permutation(len(units))[:half]:
            rows += units[unit]
        values.append(of_rows(torch.tensor(rows)))
    # 1/G over 1/h - 1/G = (G - h) / (h G) is h / (G - h)
    spread = float(np.std(values, ddof=1)) * (half / (len(units) - half)) ** 0.5
    method = f"normal, spread of {repeats} random halves"
    quantile = Z
    if clusters is not None:
        method += f" of {len(units)} {over}"
        if len(units) < FEW_CLUSTERS:
            quantile = student_quantile(len(units) - 1)
            method = method.replace("normal", "Student's t", 1)
    return normal_interval(value, spread, method, low=low, high=high, quantile=quantile)
