"""The tests that docs/robustness.md and docs/security.md name exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
NAMED_FILE = re.compile(r"`(tests/[\w/.]+)`")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def last_cells(text: str) -> list[str]:
    """The last cell of every row of the tables on a page, without their heads."""
    cells = []
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith("| case "):
            cells.append(re.split(r"(?<!\\)\|", line)[-2].strip())
    return cells


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", ["robustness.md", "security.md"])
def test_every_test_that_a_page_names_exists(name):
    missing = []
    for path, function in NAMED_TEST.findall(page(name)):
        if not (ROOT / path).is_file() or function not in functions_of(ROOT / path):
            missing.append(f"{path}::{function}")
    assert missing == []
    assert [path for path in NAMED_FILE.findall(page(name)) if not (ROOT / path).exists()] == []


def test_every_row_of_the_page_on_robustness_names_its_tests_in_one_form():
    cells = last_cells(page("robustness.md"))
    assert len(cells) > 100
    with_tests = [cell for cell in cells if "test_" in cell]
    wrong = [cell for cell in with_tests if NAMED_TEST.sub("", cell).strip(", ")]
    assert wrong == []
