"""MSID against the authors' algorithm restated in numpy and scipy, and against exact spectra."""

import importlib

import numpy as np
import pytest
import scipy.sparse
import torch
from helpers.feature_sets import gaussian_sets

from diffadapt.metrics import msid
from diffadapt.metrics.msid import (
    TIMES,
    estimated_heat_trace,
    exact_heat_trace,
    laplacian,
    msid_with_interval,
)

MODULE = importlib.import_module("diffadapt.metrics.msid")  # the package's attribute is the function


def _restated_laplacian(rows, k):
    n, links = len(rows), scipy.sparse.lil_matrix((len(rows), len(rows)))
    squares = (rows * rows).sum(axis=1)
    for i in range(n):
        nearest = np.argpartition(squares - 2 * rows[i] @ rows.T, k + 1)[: k + 1]
        links[i, nearest[nearest != i]] = 1
    links = ((links + links.T) > 0).astype(float)
    scale = scipy.sparse.diags(1 / np.sqrt(np.asarray(links.sum(axis=1)).ravel()))
    return (scipy.sparse.eye(n) - scale @ links @ scale).tocsr()


def _restated_traces(matrix, steps=10, probes=100):
    """tr exp(-tL) by Lanczos, one probe after the other, with the authors' control variate."""
    n, times = matrix.shape[0], np.logspace(-1, 1, 256)
    starts, heat, drift = np.random.randn(n, probes), 0, 0
    for start in starts.T:
        basis, diagonal, beside = [start / np.linalg.norm(start)], [], []
        for step in range(steps):
            vector = matrix @ basis[-1]
            diagonal.append(vector @ basis[-1])
            for _ in range(3):
                for known in basis:
                    vector = vector - (vector @ known) * known
            if step < steps - 1:
                beside.append(np.linalg.norm(vector))
                basis.append(vector / beside[-1])
        nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        weights = n * vectors[0] ** 2 / probes
        heat = heat + np.exp(-np.outer(times, nodes)) @ weights
        drift = drift + -np.outer(times, nodes) @ weights
    return heat - (n + drift) / np.exp(times) + n - times * n / np.exp(times)


def _restated(x, y, k, seed):
    np.random.seed(seed)
    first, second = (1e6 * _restated_traces(_restated_laplacian(rows, k)) / len(rows) for rows in (x, y))
    times = np.logspace(-1, 1, 256)
    return np.max(np.exp(-2 * (times + 1 / times)) * np.abs(first - second))


@pytest.mark.parametrize(("sizes", "k", "seed"), [((90, 70), 5, 0), ((60, 60), 3, 7)])
def test_equals_the_authors_algorithm_at_its_seed(sizes, k, seed):
    real, generated = gaussian_sets(*sizes)
    found = msid(real=real, generated=generated, k=k, seed=seed, trace="slq", common_probes=False)
    assert found == pytest.approx(_restated(real.numpy(), generated.numpy(), k, seed), rel=1e-9)


@pytest.mark.parametrize("rows", [7, 512])
def test_laplacian_is_the_authors(monkeypatch, rows):
    monkeypatch.setattr(MODULE, "ROWS", rows)
    features, _ = gaussian_sets()
    expected = _restated_laplacian(features.numpy(), 5).toarray()
    np.testing.assert_allclose(laplacian(features, 5).to_dense(), expected, atol=1e-15)


def test_exact_trace_is_that_of_the_matrix_exponential():
    matrix = laplacian(gaussian_sets()[0], 5)
    for index in (0, 100, 255):
        expected = torch.matrix_exp(-TIMES[index] * matrix.to_dense()).trace()
        assert float(exact_heat_trace(matrix)[index]) == pytest.approx(float(expected), rel=1e-12)


def test_estimated_trace_is_near_the_exact_one(monkeypatch):
    matrix = laplacian(gaussian_sets(400)[0], 5)
    probes = torch.randn(400, 100, dtype=torch.float64)
    estimate = estimated_heat_trace(matrix, probes)
    assert torch.allclose(estimate, exact_heat_trace(matrix), rtol=0.02)
    monkeypatch.setattr(MODULE, "PROBES_AT_ONCE", 9)
    assert torch.allclose(estimated_heat_trace(matrix, probes), estimate, rtol=1e-10)


def test_the_exact_trace_has_no_seed_and_serves_small_sets(monkeypatch):
    real, generated = gaussian_sets()
    exact = msid(real=real, generated=generated)
    assert exact == msid(real=real, generated=generated, seed=1, trace="exact")
    monkeypatch.setattr(MODULE, "EXACT_UP_TO", 50)
    assert msid(real=real, generated=generated) == msid(real=real, generated=generated, trace="slq")


def test_common_probes_cancel_for_equal_sets():
    real, _ = gaussian_sets()
    assert msid(real=real, generated=real, trace="slq") == 0
    assert msid(real=real, generated=real, trace="slq", common_probes=False) > 0.1
    assert msid(real=real, generated=real) == 0


def test_copies_of_one_image_do_not_break_the_graph():
    real, generated = gaussian_sets()
    generated[:20] = generated[0]
    assert msid(real=real, generated=generated) > 0


def test_interval_is_the_spread_of_halves():
    real, generated = gaussian_sets()
    found = msid_with_interval(real=real, generated=generated, repeats=4)
    assert 0 <= found.interval.low <= found.value < found.interval.high
    assert "4 random halves" in found.interval.method


def test_unknown_trace_and_too_few_images_are_refused():
    real, generated = gaussian_sets(20, 6)
    with pytest.raises(ValueError, match="expected auto, exact or slq"):
        msid(real=real, generated=real, trace="dense")
    with pytest.raises(ValueError, match="more than 6 images, got 6"):
        msid(real=real, generated=generated, k=5)
