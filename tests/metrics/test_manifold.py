"""Precision, recall, density, coverage and realism against torch-fidelity and their definitions restated."""

import numpy as np
import pytest
import torch
from helpers.feature_sets import gaussian_sets
from torch_fidelity.metric_prc import prc_features_to_metric

from diffadapt.metrics import density_coverage, precision_recall, realism
from diffadapt.metrics.manifold import (
    density_coverage_counts,
    density_coverage_with_interval,
    neighbour_distances,
    precision_recall_hits,
    precision_recall_with_interval,
)


def _distances(x, y):
    return np.linalg.norm(x.numpy()[:, None] - y.numpy()[None], axis=2)


def _restated(real, generated, k):
    """Precision, recall, density, coverage as prdc writes them, ties strictly inside."""
    radii = [np.sort(_distances(rows, rows), axis=1)[:, k] for rows in (real, generated)]
    across = _distances(real, generated)
    in_real, in_generated = across < radii[0][:, None], across < radii[1][None]
    return in_real.any(0).mean(), in_generated.any(1).mean(), in_real.sum(0).mean() / k, in_real.any(1).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_agrees_with_torch_fidelity(k):
    real, generated = gaussian_sets()
    options = {"prc_neighborhood": k, "prc_batch_size": 1000, "save_cpu_ram": False, "verbose": False}
    expected = prc_features_to_metric(generated, real, **options)
    found = precision_recall(real=real, generated=generated, k=k)
    assert found == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [0, 1e4])
def test_equals_the_definitions_exactly(dtype, offset):
    real, generated = ((rows + offset).to(dtype) for rows in gaussian_sets(150, 130, width=16))
    expected = _restated(real.double(), generated.double(), 4)
    found = precision_recall(real=real, generated=generated, k=4)
    found += density_coverage(real=real, generated=generated, k=4)
    assert found == tuple(pytest.approx(value, abs=1e-12) for value in expected)


def test_ties_count_for_precision_and_not_for_coverage():
    line = torch.arange(6.0)[:, None]
    beside = torch.tensor([[-1.0], [-50.0]])  # exactly one radius from the first real image
    assert precision_recall_hits(real=line, generated=beside, k=1)[0].tolist() == [True, False]
    assert density_coverage_counts(real=line, generated=beside, k=1)[0].tolist() == [0, 0]


def test_ties_that_float32_cannot_see_are_decided_in_float64():
    line = 1e6 + torch.arange(6, dtype=torch.float64)[:, None]
    near = 1e6 + torch.tensor([[-1 - 1e-9], [-1 + 1e-9]], dtype=torch.float64)
    assert precision_recall_hits(real=line, generated=near, k=1)[0].tolist() == [False, True]


def test_blocks_change_nothing(monkeypatch):
    real, generated = gaussian_sets()
    whole = precision_recall(real=real, generated=generated), density_coverage(real=real, generated=generated)
    monkeypatch.setattr("diffadapt.metrics.neighbours.ROWS", 7)
    monkeypatch.setattr("diffadapt.metrics.neighbours.COLUMNS", 9)
    monkeypatch.setattr("diffadapt.metrics.neighbours.PAIRS", 5)
    assert whole == (
        precision_recall(real=real, generated=generated),
        density_coverage(real=real, generated=generated),
    )


def test_nearest_neighbours_are_exact_among_many_candidates_too_near_to_call():
    generator = torch.Generator().manual_seed(0)
    cluster = 1000 + 1e-3 * torch.randn(200, 4, dtype=torch.float64, generator=generator)
    rows = torch.cat([cluster, -cluster])  # the common centre is far from both clusters
    expected = np.sort(_distances(rows, rows), axis=1)[:, 1:4]
    np.testing.assert_allclose(neighbour_distances(rows, 3), expected, rtol=1e-9)


def test_known_neighbours_are_used():
    real, generated = gaussian_sets()
    known = {
        "real_neighbours": neighbour_distances(real, 5),
        "generated_neighbours": neighbour_distances(generated, 5),
    }
    found = precision_recall_hits(real=real, generated=generated, k=3, **known)
    expected = precision_recall_hits(real=real, generated=generated, k=3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    nothing = {name: values * 0 for name, values in known.items()}
    assert not precision_recall_hits(real=real, generated=generated, k=3, **nothing)[0].any()


def test_a_collapsed_generator_is_precise_and_recalls_nothing():
    real, _ = gaussian_sets(300)
    collapsed = real[:1] + 1e-3 * gaussian_sets(300, seed=1)[0]
    precise, recalled = precision_recall(real=real, generated=collapsed)
    assert precise == 1
    assert recalled == pytest.approx(1 / 300)  # the one real image it repeats
    assert density_coverage(real=real, generated=collapsed)[1] < 0.1


def test_outliers_lift_precision_and_not_coverage():
    real, _ = gaussian_sets(500, width=32)
    elsewhere = gaussian_sets(500, width=32, seed=1)[0] + 1.5
    far = real.clone()
    far[:10] *= 20
    assert precision_recall(real=real, generated=elsewhere)[0] < 0.05
    assert precision_recall(real=far, generated=elsewhere)[0] > 0.5
    assert density_coverage(real=far, generated=elsewhere)[1] < 0.05


def test_realism_is_infinite_on_a_real_image_also_where_its_ball_is_a_point():
    real = torch.cat([torch.zeros(5, 3), torch.randn(12, 3) + 4])
    generated = torch.cat([torch.zeros(1, 3), torch.randn(4, 3)])
    values = realism(real=real, generated=generated, k=3)
    assert values[0] == torch.inf
    assert values[1:].isfinite().all()


def test_realism_is_the_ratio_of_the_definition():
    real, generated = gaussian_sets()
    radii = np.sort(_distances(real, real), axis=1)[:, 3]
    kept = radii <= np.sort(radii)[(len(radii) - 1) // 2]
    expected = (radii[kept] / _distances(generated, real[kept])).max(axis=1)
    np.testing.assert_allclose(realism(real=real, generated=generated), expected, rtol=1e-5)
    assert realism(real=real, generated=real[kept])[0] == torch.inf


def test_intervals_hold_their_values():
    real, generated = gaussian_sets()
    found = precision_recall_with_interval(real=real, generated=generated)
    found |= density_coverage_with_interval(real=real, generated=generated)
    values = (
        *precision_recall(real=real, generated=generated),
        *density_coverage(real=real, generated=generated),
    )
    assert [estimate.value for estimate in found.values()] == pytest.approx(values)
    for estimate in found.values():
        assert estimate.interval.low < estimate.value < estimate.interval.high


def test_more_neighbours_than_images_are_refused():
    real, generated = gaussian_sets(5, 3)
    with pytest.raises(ValueError, match="3 nearest neighbours need more than 3 images, got 3"):
        precision_recall(real=real, generated=generated, k=3)
