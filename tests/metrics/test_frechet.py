"""Frechet distances against closed forms, torch-fidelity, torchmetrics and scipy's matrix root."""

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.feature_sets import gaussian_sets
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from diffadapt.metrics import Statistics, fid, fid_infinity
from diffadapt.metrics.analytic import points_with_moments
from diffadapt.metrics.frechet import fid_infinity_with_interval, fid_with_interval, influences


def _random_covariance(width, seed):
    rows = torch.randn(3 * width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / (3 * width)


@pytest.mark.parametrize("width", [2, 7, 20])
def test_distance_of_gaussians_has_its_closed_form(width):
    first, second = _random_covariance(width, 1), _random_covariance(width, 2)
    mean = torch.linspace(0, 1, width, dtype=torch.float64)
    root = scipy.linalg.sqrtm((first @ second).numpy()).real
    expected = float(mean @ mean + first.trace() + second.trace()) - 2 * np.trace(root)
    real, generated = points_with_moments(mean * 0, first), points_with_moments(mean, second)
    assert fid(real=real, generated=generated) == pytest.approx(expected, rel=1e-10)


# Rows fewer than features: the others' general eigenvalues are exact to about 1e-7 only.
@pytest.mark.parametrize(
    ("n_real", "n_generated", "tolerance"), [(120, 90, 1e-9), (120, 8, 1e-6), (8, 90, 1e-6), (9, 7, 1e-6)]
)
def test_agrees_with_torch_fidelity(n_real, n_generated, tolerance):
    real, generated = gaussian_sets(n_real, n_generated)
    statistics = [fid_features_to_statistics(each) for each in (generated, real)]
    expected = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert fid(real=real, generated=generated) == pytest.approx(expected, rel=tolerance)


def test_agrees_with_torchmetrics():
    class Features(nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1)

    real, generated = gaussian_sets()
    oracle = FrechetInceptionDistance(Features()).set_dtype(torch.float64)
    for rows, is_real in ((real, True), (generated, False)):
        oracle.update(rows.view(-1, 3, 2, 2), real=is_real)
    assert fid(real=real, generated=generated) == pytest.approx(float(oracle.compute()), rel=1e-6)


def test_all_forms_agree_when_there_are_fewer_images_than_features():
    real, generated = gaussian_sets(30, 25, width=40)
    whole = Statistics.of(real)
    without_rows = Statistics(whole.mean, whole.covariance, whole.n)  # forces the root of the covariance
    assert fid(real=real, generated=generated) == pytest.approx(fid(real=without_rows, generated=generated))
    turned = fid(real=generated, generated=without_rows)
    assert fid(real=generated, generated=real) == pytest.approx(turned, rel=1e-6)


def test_is_symmetric_and_zero_for_equal_sets():
    real, generated = gaussian_sets()
    assert fid(real=real, generated=generated) == pytest.approx(
        fid(real=generated, generated=real), rel=1e-10
    )
    assert fid(real=real, generated=real) == pytest.approx(0, abs=1e-9)


def test_float32_features_are_summed_in_float64():
    real, generated = gaussian_sets()
    shifted = fid(real=(real + 1000).float(), generated=(generated + 1000).float())
    assert shifted == pytest.approx(fid(real=real, generated=generated), rel=1e-4)


def test_the_factor_of_the_reference_is_computed_once(monkeypatch):
    real, generated = gaussian_sets()
    reference, calls, eigh = Statistics.of(real), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    for scale in (1, 2, 3):
        fid(real=reference, generated=generated * scale)
    assert len(calls) == 1


def test_statistics_in_blocks_equal_those_of_numpy(monkeypatch):
    monkeypatch.setattr("diffadapt.metrics.frechet.ROWS", 7)
    real, _ = gaussian_sets()
    found = Statistics.of(real)
    np.testing.assert_allclose(found.covariance, np.cov(real.numpy(), rowvar=False), rtol=1e-10, atol=1e-14)


def test_extrapolation_removes_the_bias_of_few_images():
    real, _ = gaussian_sets(20_000)
    generated = gaussian_sets(400, seed=5)[0]  # the same distribution: the true distance is almost 0
    limit = fid_infinity(real=real, generated=generated)
    assert abs(limit) < 0.15 * fid(real=real, generated=generated)
    assert limit == fid_infinity(real=real, generated=generated, seed=0)
    assert limit != fid_infinity(real=real, generated=generated, seed=1)


def test_influence_is_the_derivative_of_the_distance():
    real, generated = gaussian_sets()
    reference, whole = Statistics.of(real), Statistics.of(generated)
    step, weights = 1e-6, torch.zeros(len(generated), dtype=torch.float64)
    weights[3] = 1  # a little more of image 3, a little less of all
    mean = (1 - step) * whole.mean + step * generated[3]
    centred = generated - mean
    spread = (1 - step) * centred.T @ centred / len(generated) + step * torch.outer(centred[3], centred[3])
    biased = (generated - whole.mean).T @ (generated - whole.mean) / len(generated)
    at_rest = Statistics(whole.mean, biased, whole.n, generated)
    moved = fid(real=reference, generated=Statistics(mean, spread, whole.n))
    slope = (moved - fid(real=reference, generated=at_rest)) / step
    found = influences(real=reference, generated=at_rest)
    assert float(found[3] - found.mean()) == pytest.approx(slope, rel=1e-3)


def test_intervals_lie_about_the_distance_without_bias():
    real, generated = gaussian_sets(2000, 300)
    found = fid_with_interval(real=real, generated=generated)
    limit = fid_infinity_with_interval(real=real, generated=generated)
    assert found.interval.low < limit.value < found.interval.high
    assert (found.interval.low + found.interval.high) / 2 < found.value
    assert found.interval.method.startswith("reverse bootstrap")
    assert limit.interval.low < limit.value < limit.interval.high


def test_no_interval_of_the_limit_with_fewer_images_than_features():
    real, generated = gaussian_sets(60, 30, width=40)
    assert fid_infinity_with_interval(real=real, generated=generated).interval is None


def test_extrapolation_needs_twenty_images():
    real, generated = gaussian_sets(60, 19)
    with pytest.raises(ValueError, match="19 images"):
        fid_infinity(real=real, generated=generated)
