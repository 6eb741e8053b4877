"""Inception Score against torch-fidelity and torchmetrics."""

import pytest
import torch
from helpers.feature_sets import gaussian_sets
from torch import nn
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.image.inception import InceptionScore

from diffadapt.metrics import inception_score, is_gap
from diffadapt.metrics.inception_score import inception_score_with_interval, is_gap_with_interval


@pytest.mark.parametrize("splits", [1, 7, 10])
def test_agrees_with_torch_fidelity(splits):
    logits = 3 * gaussian_sets()[0]
    expected = isc_features_to_metric(logits, splits, True, 2020)
    mean, deviation = inception_score(logits=logits, splits=splits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-9, abs=1e-12)


def test_agrees_with_torchmetrics_on_one_split():
    logits = 3 * gaussian_sets()[0]
    oracle = InceptionScore(nn.Flatten(), splits=1).set_dtype(torch.float64)
    oracle.update(logits.view(-1, 3, 2, 2))
    assert inception_score(logits=logits, splits=1)[0] == pytest.approx(float(oracle.compute()[0]), rel=1e-6)


def test_the_seed_shuffles():
    logits = 3 * gaussian_sets()[0]
    assert inception_score(logits=logits, seed=1) != inception_score(logits=logits)


def test_gap_is_the_difference_of_two_scores():
    real, generated = gaussian_sets(90, 90)
    gap = is_gap(real_logits=real, generated_logits=3 * generated)
    expected = inception_score(logits=3 * generated)[0] - inception_score(logits=real)[0]
    assert (
        gap == pytest.approx(expected, rel=1e-12) == is_gap(real_logits=3 * generated, generated_logits=real)
    )
    found = is_gap_with_interval(real_logits=real, generated_logits=3 * generated)
    assert found.interval.low < found.value == gap < found.interval.high
    assert is_gap_with_interval(real_logits=real, generated_logits=real).interval.low == 0


@pytest.mark.parametrize(("splits", "method"), [(10, "over 10 splits"), (1, "random halves")])
def test_interval_names_its_method(splits, method):
    found = inception_score_with_interval(logits=3 * gaussian_sets()[0], splits=splits)
    assert method in found.interval.method
    assert 1 <= found.interval.low < found.value < found.interval.high


def test_more_splits_than_pairs_of_images_are_refused():
    with pytest.raises(ValueError, match="5 images cannot be cut into 10 splits"):
        inception_score(logits=torch.randn(5, 8))
