"""The benchmark beside torch-fidelity: its page says what was measured, its agreement is of all values."""

import argparse

import evaluation_speed
import pytest


def test_the_page_shows_medians_ratios_within_rounds_and_differences():
    theirs = dict.fromkeys(evaluation_speed.SCORE_NAMES, 2.0)
    own = dict.fromkeys(evaluation_speed.SCORE_NAMES.values(), 2.0) | {"recall": 2.1}
    measured = {
        ("torch-fidelity", "inception"): {"clock": [9, 11, 10], "cpu": [10, 10, 40], "values": theirs},
        ("diffadapt", "inception"): {"clock": [6, 7, 5], "cpu": [5, 6, 20], "values": own},
        ("torch-fidelity", "vgg16"): {"clock": [30, 30, 30], "cpu": [20, 20, 80], "values": theirs},
        ("diffadapt", "vgg16"): {"clock": [20, 20, 20], "cpu": [10, 10, 40], "values": own},
    }
    options = argparse.Namespace(images=4, side=8, repeats=3, threads=1, manifolds=["inception", "vgg16"])
    text = evaluation_speed.page(measured, options)
    assert "| inception | diffadapt | 6.0 | 6.0 | 0.50 | 5e-02 |" in text
    assert "| inception | torch-fidelity | 10.0 | 10.0 | 1.00 |  |" in text
    assert "default of two: 0.25 of its CPU time" in text
    assert "--images 4 --side 8 --repeats 3 --threads 1 --manifolds inception vgg16" in text


def test_runs_are_measured_in_turns():
    order = []
    runs = {("a", "x"): lambda: order.append("a") or {}, ("b", "x"): lambda: order.append("b") or {}}
    measured = evaluation_speed.measure(runs, 2)
    assert order == ["a", "b", "a", "b"]
    assert [len(row["cpu"]) for row in measured.values()] == [2, 2]


def test_the_difference_is_the_largest_of_all_values():
    theirs = dict.fromkeys(evaluation_speed.SCORE_NAMES, 4.0)
    own = dict.fromkeys(evaluation_speed.SCORE_NAMES.values(), 4.0) | {"fid": 5.0}
    assert evaluation_speed.largest_difference(theirs, own) == pytest.approx(0.25)
