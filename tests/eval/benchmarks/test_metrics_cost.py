"""The benchmark of the metrics compares ways to the same numbers."""

from types import SimpleNamespace

import metrics_cost
import pytest
import torch

from diffadapt.metrics import Statistics, fid, kid, precision_recall
from diffadapt.metrics.msid import neighbour_links


def test_both_sides_give_the_same_numbers():
    generator = torch.Generator().manual_seed(0)
    real, generated, logits = torch.randn(3, 100, 12, generator=generator, dtype=torch.float64)
    sets = {"real": real, "generated": 1.2 * generated}
    known, scored = (Statistics.of(rows) for rows in sets.values())
    assert metrics_cost.frechet_by_matrix_root(known, scored) == pytest.approx(fid(**sets), rel=1e-8)
    assert metrics_cost.all_metrics_of_torch_fidelity(**sets, logits=logits) == pytest.approx(
        fid(**sets), rel=1e-8
    )
    assert metrics_cost.precision_of_torch_fidelity(**sets) == pytest.approx(precision_recall(**sets)[0])
    assert metrics_cost.kernel_of_torch_fidelity(**sets) == pytest.approx(
        kid(**sets), rel=1e-9
    )  # one subset: all
    assert metrics_cost.links_row_by_row(real.numpy()) == len(neighbour_links(real, 5)[0])


def test_a_row_holds_times_ratio_goal_and_values():
    pair = metrics_cost.Pair("FID", "other", lambda: 2.0, lambda: 2.0, "6")
    cells = [cell.strip() for cell in metrics_cost._row(pair, 2).strip("|").split("|")]
    assert cells[:2] == ["FID", "other"]
    assert [float(cell) >= 0 for cell in cells[2:4]] == [True, True]
    assert cells[5:] == [">= 6", "2, 2"]


def test_memory_is_this_processs():
    assert 0.05 < metrics_cost._peak_memory() < 64


def test_the_page_has_rows_and_memory():
    options = SimpleNamespace(images=50, many=20_000, rounds=3, output="page.md", memory=False)
    page = metrics_cost._page(options, ["| FID | row |"], kept=0.5, seconds=123.4, memory=1.25)
    assert "| FID | row |" in page
    assert "1.25" in page
    assert "{" not in page
