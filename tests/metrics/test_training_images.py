"""Scores against the images trained on, AuthPct and FLS, by restatements in float64."""

import numpy as np
import pytest
import torch
from helpers.feature_sets import gaussian_sets

from diffadapt.metrics import authpct, fls
from diffadapt.metrics.authenticity import authpct_with_interval, is_authentic
from diffadapt.metrics.likelihood import fls_with_interval


def _distances(first, second):
    return np.linalg.norm(first[:, None] - second[None], axis=2)


@pytest.mark.parametrize("rows", [128, 7])  # at a time
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_authpct_is_its_definition(rows, dtype, monkeypatch):
    monkeypatch.setattr("diffadapt.metrics.neighbours.ROWS", rows)
    training, generated = (rows.to(dtype) for rows in gaussian_sets(60, 40, width=3))
    generated[:5] = training[:5]  # copies
    first, second = training.double().numpy(), generated.double().numpy()
    between = _distances(second, first)
    within = _distances(first, first) + np.diag([np.inf] * 60)
    nearest = between.argmin(axis=1)
    expected = within[nearest].min(axis=1) < between.min(axis=1)
    assert is_authentic(training=training, generated=generated).tolist() == expected.tolist()
    assert not expected[:5].any()
    assert authpct(training=training, generated=generated) == pytest.approx(100 * expected.mean())
    found = authpct_with_interval(training=training, generated=generated).interval
    assert 0 <= found.low < 100 * expected.mean() < found.high <= 100


def _surprise(fitting, test, centres):
    """Adam on the bandwidths with the gradient written out; mean -log density of the test images."""
    squared, width = _distances(fitting, centres) ** 2, fitting.shape[1]
    logs, first, second = (np.zeros(len(centres)) for _ in range(3))
    for step in range(1, 101):
        exponents = -squared / (2 * np.exp(logs)) - width / 2 * logs
        shares = np.exp(exponents - exponents.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        gradient = -(shares * (squared / (2 * np.exp(logs)) - width / 2)).mean(axis=0)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rate = 0.5 if step <= 50 else 0.05
        logs = logs - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        logs = logs.clip(-100, 20)
    exponents = -(_distances(test, centres) ** 2) / (2 * np.exp(logs)) - width / 2 * logs
    top = exponents.max(axis=1)
    return -(top + np.log(np.exp(exponents - top[:, None]).mean(axis=1))).mean()


def test_fls_is_its_definition():
    training, generated = gaussian_sets(40, 20, width=4)
    test = gaussian_sets(20, width=4, seed=5)[0]
    found = fls_with_interval(training=training, test=test, generated=generated)
    generator = np.random.default_rng(0)
    test = test.numpy()[generator.permutation(20)]
    drawn = generated.numpy()[generator.permutation(20)]
    halves = training.numpy()[generator.permutation(40)]
    everything = np.concatenate([halves, test, drawn])
    mean, deviation = everything.mean(axis=0), everything.std(axis=0, ddof=1)
    fitting, baseline, test, drawn = (
        (rows - mean) / deviation for rows in (halves[:20], halves[20:], test, drawn)
    )
    difference = _surprise(fitting, test, drawn) - _surprise(fitting, test, baseline)
    assert found.value == pytest.approx(100 * np.exp(-2 * difference / 4), rel=1e-6)
    assert found.interval.low < found.value < found.interval.high


def test_fls_falls_for_poor_images_and_for_copies():
    real = gaussian_sets(400, width=4)[0]
    training, test, good = real[:200], real[200:300], real[300:]
    of_good = fls(training=training, test=test, generated=good)
    assert 80 < of_good < 125
    assert fls(training=training, test=test, generated=good + 2) < 0.8 * of_good
    assert fls(training=training[:100], test=test, generated=training[:50].clone()) < of_good


def test_a_constant_column_and_too_few_training_images():
    training, generated = gaussian_sets(40, 20, width=4)
    columns = [torch.cat([rows, torch.ones(len(rows), 1)], dim=1) for rows in (training, generated)]
    found = fls(training=columns[0], test=columns[1], generated=columns[1])
    assert np.isfinite(found)
    with pytest.raises(ValueError, match="3 training images cannot be cut into two halves"):
        fls(training=training[:3], test=generated, generated=generated)
