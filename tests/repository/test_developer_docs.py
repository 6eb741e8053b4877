"""The pages for developers name files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("CONTRIBUTING.md", "docs/architecture.md", "docs/extending.md")
PATH = re.compile(r"\b((?:[\w.-]+/)*[\w-]+\.(?:py|md|txt|svg))\b")
EXAMPLES = {"NAME.py", "utils.py"}  # a place to fill in; a file that must not exist


def named_paths(page):
    names = set(PATH.findall((ROOT / page).read_text(encoding="utf-8")))
    return sorted(name for name in names if Path(name).name not in EXAMPLES)


def exists(name, page):
    places = (ROOT, ROOT / "diffadapt", (ROOT / page).parent)
    return any((place / name).exists() for place in places) or any((ROOT / "diffadapt").rglob(name))


@pytest.mark.parametrize("page", PAGES)
def test_every_named_file_exists(page):
    names = named_paths(page)
    assert names
    assert [name for name in names if not exists(name, page)] == []
