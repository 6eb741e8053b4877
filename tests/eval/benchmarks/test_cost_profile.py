"""Where a step's time goes: operators sorted by kind, and the page of a tiny base."""

import sys

import cost_profile
import pytest


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "products"),
        ("aten::mm", "products"),
        ("aten::addmm_", "products"),
        ("aten::baddbmm", "products"),
        ("aten::_slow_conv2d_backward", "convolutions"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::native_group_norm_backward", "norms and activations"),
        ("aten::addcmul", "element by element"),
        ("aten::mul_", "element by element"),
        ("aten::expand", "all else"),
    ],
)
def test_kinds(operator, kind):
    assert cost_profile.kind_of(operator) == kind


@pytest.mark.slow
def test_a_page_has_a_row_for_every_method(monkeypatch, tmp_path):
    output = tmp_path / "page.md"
    command = [
        "cost_profile.py",
        "--base",
        "tiny",
        "--threads",
        "1",
        "--rounds",
        "1",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", "floor", "liera", "naive:liera"])
    cost_profile.main()
    rows = [
        line.split("|") for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    found = {row[1].strip(): [float(cell) for cell in row[2:-1]] for row in rows[1:]}
    assert set(found) == {"floor", "liera", "naive:liera"}
    assert all(row[-1] > 0 for row in found.values())
    assert all(abs(sum(row[:-1]) - row[-1]) < 0.05 for row in found.values())
