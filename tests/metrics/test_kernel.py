"""The kernel distance against torch-fidelity, torchmetrics, its definition; its variance against scatter."""

import numpy as np
import pytest
import torch
from helpers.feature_sets import gaussian_sets
from torch import nn
from torch.nn.functional import normalize
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.kid import KernelInceptionDistance

from diffadapt.metrics import cmmd, kid, kid_subsets
from diffadapt.metrics.kernel import (
    cmmd_with_interval,
    kid_subset_values,
    kid_subsets_with_interval,
    kid_with_interval,
    paired_kid_difference,
)


def test_subsets_are_those_of_torch_fidelity():
    real, generated = gaussian_sets()
    expected = kid_features_to_metric(generated, real, kid_subsets=20, kid_subset_size=50, verbose=False)
    options = {"subsets": 20, "size": 50, "seed": 2020}
    found = kid_subset_values(real=real, generated=generated, **options)
    mean = kid_subsets(real=real, generated=generated, **options)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-10)
    assert float(found.std(correction=0)) == pytest.approx(
        expected["kernel_inception_distance_std"], rel=1e-10
    )


def test_all_pairs_are_torchmetrics_subset_of_everything():
    class Features(nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1)

    real, generated = gaussian_sets(60, 60)
    oracle = KernelInceptionDistance(Features(), subsets=1, subset_size=60).set_dtype(torch.float64)
    for rows, is_real in ((real, True), (generated, False)):
        oracle.update(rows.view(-1, 3, 2, 2), real=is_real)
    assert kid(real=real, generated=generated) == pytest.approx(float(oracle.compute()[0]), rel=1e-6)


def test_all_pairs_are_the_sums_of_the_definition():
    real, generated = gaussian_sets(9, 7, width=3)

    def kernel(x, y):
        return float((x @ y / 3 + 1) ** 3)

    within = [
        sum(kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j)
        / (len(rows) * (len(rows) - 1))
        for rows in (real, generated)
    ]
    across = sum(kernel(x, y) for x in real for y in generated) / (9 * 7)
    assert kid(real=real, generated=generated) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_blocks_change_nothing(monkeypatch):
    real, generated = gaussian_sets()
    whole = kid_with_interval(real=real, generated=generated)
    monkeypatch.setattr("diffadapt.metrics.kernel.ROWS", 11)
    blocked = kid_with_interval(real=real, generated=generated)
    assert blocked.value == pytest.approx(whole.value, rel=1e-12)
    assert blocked.interval.high == pytest.approx(whole.interval.high, rel=1e-10)


@pytest.mark.parametrize("shift", [0.0, 0.3])  # without and with first-order terms
def test_the_interval_is_as_wide_as_the_estimates_scatter(shift):
    found = []
    for seed in range(100):
        first, second = gaussian_sets(60, 80, width=4, seed=seed)
        found.append(kid_with_interval(real=first, generated=(second - 0.3) / 0.9 + shift))
    scatter = float(torch.tensor([each.value for each in found]).std())
    widths = torch.tensor([each.interval.high - each.interval.low for each in found])
    assert float(widths.mean()) / 2 / 1.96 == pytest.approx(scatter, rel=0.25)


def test_the_interval_of_subsets_is_as_wide_as_their_means_scatter():
    found = []
    for seed in range(100):
        first, second = gaussian_sets(60, 80, width=4, seed=seed)
        options = {"subsets": 4, "size": 20, "seed": seed}
        found.append(kid_subsets_with_interval(real=first, generated=second, **options))
    scatter = float(torch.tensor([each.value for each in found]).std())
    widths = torch.tensor([each.interval.high - each.interval.low for each in found])
    assert float(widths.mean()) / 2 / 1.96 == pytest.approx(scatter, rel=0.25)


def test_subsets_larger_than_a_set_are_refused():
    real, generated = gaussian_sets(30, 20)
    with pytest.raises(ValueError, match="subsets of 25 images"):
        kid_subsets(real=real, generated=generated, size=25)


def test_cmmd_is_its_definition():
    """Pair by pair in numpy: the biased estimate, sigma = 10, times 1000."""
    real, generated = (normalize(rows).numpy() for rows in gaussian_sets(25, 19))

    def mean_kernel(first, second):
        squared = ((first[:, None] - second[None]) ** 2).sum(axis=2)
        return np.exp(-squared / (2 * 10.0**2)).mean()

    expected = 1000 * (
        mean_kernel(real, real) + mean_kernel(generated, generated) - 2 * mean_kernel(real, generated)
    )
    assert cmmd(real=real, generated=generated) == pytest.approx(expected, rel=1e-9)
    assert cmmd(real=real, generated=real) == pytest.approx(0, abs=1e-9)


def test_cmmd_intervals_hold_its_mean_at_these_numbers():
    found = []
    for seed in range(150):
        real, generated = (normalize(rows) for rows in gaussian_sets(60, 50, seed=seed))
        found.append(cmmd_with_interval(real=real, generated=generated))
    mean = np.mean([each.value for each in found])
    assert np.mean([each.interval.low <= mean <= each.interval.high for each in found]) >= 0.9


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.slow
def test_paired_differences_have_their_own_variance(scale):
    """Without a difference random halves of the pairs give 1.7 times this width."""
    real = gaussian_sets(80, width=6, seed=1000)[0]
    differences = []
    variances = []
    for seed in range(250):
        first, other = gaussian_sets(70, 70, width=6, seed=seed)
        other = (other - 0.3) / 0.9 * scale
        difference, variance = paired_kid_difference(real=real, first=first, other=other)
        expected = kid(real=real, generated=other) - kid(real=real, generated=first)
        assert difference == pytest.approx(expected, rel=1e-9, abs=1e-12)
        differences.append(difference)
        variances.append(variance)
    ratio = np.mean(variances) ** 0.5 / np.std(differences)
    assert 0.85 < ratio < 1.2
    errors = (np.array(differences) - np.mean(differences)) / np.sqrt(variances)
    assert (abs(errors) < 1.96).mean() >= 0.9
