"""Intervals against scipy, and that they cover the truth as often as they say."""

import math

import numpy as np
import pytest
import torch
from helpers.feature_sets import gaussian_sets
from scipy.stats import binomtest
from scipy.stats import t as student

from diffadapt.metrics import Statistics
from diffadapt.metrics.frechet import fid_infinity_with_interval, fid_with_interval
from diffadapt.metrics.inception_score import inception_score_with_interval
from diffadapt.metrics.intervals import (
    cluster_means,
    clustered_interval,
    half_samples_interval,
    mean_interval,
    proportion_interval,
    student_quantile,
)
from diffadapt.metrics.kernel import kid_with_interval
from diffadapt.metrics.manifold import (
    density_coverage_with_interval,
    precision_recall,
    precision_recall_with_interval,
)

DRAWS = 200


@pytest.mark.parametrize(("hits", "n"), [(0, 30), (1, 30), (17, 30), (30, 30), (45_000, 50_000)])
def test_proportions_are_scipys_exact_interval(hits, n):
    expected = binomtest(hits, n).proportion_ci(method="exact")
    found = proportion_interval(hits, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30, 999, 1000])
def test_quantiles_of_students_t_are_scipys(degrees):
    # SciPy 1.15 computes 11 digits
    assert student_quantile(degrees) == pytest.approx(student.ppf(0.975, degrees), rel=1e-10)
    with pytest.raises(ValueError, match="at least 1 degree of freedom, got 0"):
        student_quantile(0)


def test_quantiles_of_students_t_are_the_closed_forms():
    """1 degree of freedom: t = tan(pi (p - 1/2)). 2 degrees: t = a sqrt(2 / (1 - a^2)), with a = 2 p - 1."""
    p = 0.975
    a = 2 * p - 1
    assert student_quantile(1) == pytest.approx(math.tan(math.pi * (p - 1 / 2)), rel=1e-13)
    assert student_quantile(2) == pytest.approx(a * math.sqrt(2 / (1 - a**2)), rel=1e-13)


@pytest.mark.parametrize("clusters", [2, 3, 5, 10, 20])
def test_intervals_over_few_clusters_cover_the_mean(clusters):
    """The percentile bootstrap of 2, 3, 5 and 10 clusters holds it in 55, 73, 88 and 90 of 100 draws."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(500, clusters, dtype=torch.float64, generator=generator)
    intervals = [clustered_interval(means, list(range(clusters))) for means in draws]
    assert "Student's t" in intervals[0].method
    assert np.mean([found.low <= 0 <= found.high for found in intervals]) >= 0.93


def test_thirty_clusters_are_bootstrapped():
    means = torch.randn(30, dtype=torch.float64)
    assert "bootstrap over 30 subjects" in clustered_interval(means, list(range(30))).method


def test_clusters_are_the_unit_of_the_interval():
    values = torch.tensor([0.0, 0.2, 1.0, 1.2, 0.5])
    clusters = ["cat", "cat", "dog", "dog", "car"]
    assert cluster_means(values, clusters) == pytest.approx({"cat": 0.1, "dog": 1.1, "car": 0.5})
    # more images, not more subjects
    copies = clustered_interval(values.repeat(50), clusters * 50)
    found = clustered_interval(values, clusters)
    assert (copies.low, copies.high) == pytest.approx((found.low, found.high))
    images = mean_interval(values.repeat(50))
    assert found.high - found.low > 5 * (images.high - images.low)
    assert "3 subjects" in found.method


def test_clustered_bootstrap_is_as_wide_as_theory():
    means = torch.randn(40, dtype=torch.float64)
    found = clustered_interval(means, list(range(40)))
    error = float(means.std(correction=0)) / 40**0.5
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.05)


def test_halves_recover_the_error_of_a_mean():
    values = torch.randn(400, dtype=torch.float64)
    found = half_samples_interval(
        0.0, lambda rows: float(values[rows].mean()), 400, repeats=300, low=-1, high=1
    )
    error = float(values.std()) / 20
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)


def test_single_values_and_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        mean_interval(torch.ones(1))
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        clustered_interval(torch.ones(4), [0, 0, 0, 0])
    with pytest.raises(ValueError, match="4 values, but clusters of 3"):
        clustered_interval(torch.ones(4), [0, 0, 1])
    with pytest.raises(ValueError, match="5 of 4"):
        proportion_interval(5, 4)


def _coverage(interval_of_seed, truth):
    """Share of draws whose 95 % interval holds the truth."""
    intervals = [interval_of_seed(seed) for seed in range(DRAWS)]
    return np.mean([found.low <= truth <= found.high for found in intervals])


def _kernel_mean(first, second):
    """E (x.y / D + 1)^3 of two Gaussians N(mean, variance I), by moments of x.y."""
    (mean_x, variance_x), (mean_y, variance_y), width = first, second, len(first[0])

    def third(mean, variance):
        eye = torch.eye(width, dtype=torch.float64)
        pairs = torch.einsum("ij,k->ijk", variance * eye, mean)
        cube = torch.einsum("i,j,k->ijk", mean, mean, mean)
        return cube + pairs + pairs.permute(0, 2, 1) + pairs.permute(2, 0, 1)

    def second_moment(mean, variance):
        return torch.outer(mean, mean) + variance * torch.eye(width, dtype=torch.float64)

    cubic = (third(mean_x, variance_x) * third(mean_y, variance_y)).sum() / width**3
    square = (second_moment(mean_x, variance_x) * second_moment(mean_y, variance_y)).sum() / width**2
    return float(cubic + 3 * square + 3 * (mean_x @ mean_y) / width + 1)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_kernel_intervals_cover(shift):
    width, scale = 8, 1 - shift / 2
    real = torch.zeros(width, dtype=torch.float64), 1.0
    generated = torch.full((width,), shift, dtype=torch.float64), scale**2
    truth = _kernel_mean(real, real) + _kernel_mean(generated, generated) - 2 * _kernel_mean(real, generated)

    def draw(seed):
        first, second = gaussian_sets(90, 120, width=width, seed=seed)
        second = (second - 0.3) / 0.9 * scale + shift
        return kid_with_interval(real=first, generated=second).interval

    assert _coverage(draw, truth) >= 0.9


@pytest.mark.parametrize(
    ("estimate", "shift"),
    [(fid_infinity_with_interval, 0.0), (fid_infinity_with_interval, 0.3), (fid_with_interval, 0.0)],
)
@pytest.mark.slow
def test_frechet_intervals_cover_the_distance_without_bias(estimate, shift):
    width, scale = 6, 1 - shift / 2
    eye = torch.eye(width, dtype=torch.float64)
    reference = Statistics(torch.zeros(width, dtype=torch.float64), eye, None)
    truth = width * (shift**2 + (1 - scale) ** 2)

    def draw(seed):
        generated = (gaussian_sets(2, 200, width=width, seed=seed)[1] - 0.3) / 0.9
        return estimate(real=reference, generated=scale * generated + shift, seed=seed).interval

    assert _coverage(draw, truth) >= 0.9


@pytest.mark.slow
def test_precision_intervals_cover():
    real, population = gaussian_sets(100, 10_000, width=6)
    truth = precision_recall(real=real, generated=population)[0]
    assert 0.6 < truth < 0.97

    def draw(seed):
        generated = gaussian_sets(2, 100, width=6, seed=seed + 1)[1]
        return precision_recall_with_interval(real=real, generated=generated)["precision"].interval

    assert _coverage(draw, truth) >= 0.9


def test_inception_score_intervals_cover():
    """With 1.96 standard errors of 10 splits they hold the truth in 89 of 100 draws."""
    generator = torch.Generator().manual_seed(0)

    def draw(seed):
        logits = 2 * torch.randn(1000, 10, dtype=torch.float64, generator=generator)
        return inception_score_with_interval(logits=logits, seed=seed)

    found = [draw(seed) for seed in range(400)]
    truth = np.mean([estimate.value for estimate in found])
    assert np.mean([each.interval.low <= truth <= each.interval.high for each in found]) >= 0.93


@pytest.mark.slow
def test_density_intervals_cover_new_sets_of_both():
    """With the error over generated images alone they hold the truth in 88 of 100 draws."""
    found = []
    for seed in range(300):
        real, generated = gaussian_sets(150, 150, width=6, seed=seed)
        found.append(density_coverage_with_interval(real=real, generated=generated)["density"])
    truth = np.mean([estimate.value for estimate in found])
    assert np.mean([each.interval.low <= truth <= each.interval.high for each in found]) >= 0.93
