"""The code that a forward of an adapted layer runs stays short enough to be followed."""

import sys
from pathlib import Path

import forward_calls
import pytest
import torch

LIMITS = {"lora": (6, 25), "flora": (7, 27), "dora": (9, 36)}  # files and calls


@pytest.mark.parametrize("method", LIMITS)
def test_a_forward_of_a_linear_layer_is_short(method):
    max_files, max_calls = LIMITS[method]
    counts = forward_calls.count(forward_calls.trace(f"diffadapt:{method}"))
    assert 0 < counts.files <= max_files
    assert 0 < counts.calls <= max_calls
    assert counts.files <= counts.functions <= counts.calls
    assert counts.depth <= counts.calls


def test_only_code_of_the_package_is_counted():
    class Model(torch.nn.Linear):
        def forward(self, x):
            return self.twice(super().forward(x))

        def twice(self, x):
            return 2 * x

    owner = "Model." if sys.version_info >= (3, 11) else ""  # Python 3.10 knows a function's name alone
    previous = sys.getprofile()
    calls = forward_calls.trace_calls(Model(2, 2), torch.ones(2), Path(__file__).parent)
    names = [(call.function, call.depth) for call in calls]
    assert names == [(f"{owner}forward", 0), (f"{owner}twice", 1)]
    assert forward_calls.count(calls) == forward_calls.Counts(files=1, functions=2, calls=2, depth=2)
    assert sys.getprofile() is previous


def test_the_page_has_a_row_for_every_variant(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    command = ["forward_calls.py", "--variants", "diffadapt:lora", "peft:lora", "--output", str(page)]
    monkeypatch.setattr(sys, "argv", command)
    forward_calls.main()
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].strip() for row in rows] == ["diffadapt:lora", "peft:lora"]
