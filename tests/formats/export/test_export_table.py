"""docs/export.md is what the verifier says now, for every method."""

from pathlib import Path

import export_table
import pytest

import diffadapt as da

ROOT = Path(__file__).parents[3]


def test_every_method_has_a_line():
    shown = {part.name for method in export_table.CASES for part in da.make_method(method).members}
    assert set(da.METHODS) - shown == set()
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert all(f"| `{method}` |" in page for method in export_table.CASES)


@pytest.mark.parametrize("method", ["dora(rank=4)", "bitfit", "norms", "difffit"])
@pytest.mark.slow
def test_the_page_is_up_to_date(method):
    _, _, line = export_table.table([export_table.export_all(method)]).splitlines()
    assert line in (ROOT / "docs" / "export.md").read_text(encoding="utf-8").splitlines()


def test_the_page_is_made_from_its_frame():
    start, end = export_table.TEXT.read_text(encoding="utf-8").split("TABLE\n")
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert page.startswith(start)
    assert page.endswith(end)
