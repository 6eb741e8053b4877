"""docs/export.md is what the verifier says now, for every method."""

import importlib.util
import sys
from pathlib import Path

import pytest

import diffadapt as da

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("export_table", ROOT / "eval" / "export_table.py")
    module = sys.modules["export_table"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_line(generator):
    shown = {part.name for method in generator.CASES for part in da.make_method(method).parts}
    assert set(da.METHODS) - shown == set()
    page = (ROOT / "docs" / "export.md").read_text()
    assert all(f"| `{method}` |" in page for method in generator.CASES)


@pytest.mark.parametrize("method", ["dora(rank=4)", "bitfit", "norms", "difffit"])
def test_the_page_is_up_to_date(method, generator):
    _, _, line = generator.table([generator.measured(method)]).splitlines()
    assert line in (ROOT / "docs" / "export.md").read_text().splitlines()


def test_the_page_is_made_from_its_frame(generator):
    start, end = generator.TEXT.read_text().split("TABLE\n")
    page = (ROOT / "docs" / "export.md").read_text()
    assert page.startswith(start)
    assert page.endswith(end)
