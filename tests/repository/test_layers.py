"""The order of the rooms: a module imports its own room and those below it, for types too."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "diffadapt"
ORDER = (
    "common",
    "assets",
    "algebra",
    "methods",
    "adapters",
    "formats",
    "pipelines",
    "models",
    "data",
    "metrics",
    "evaluation",
    "training",
    "cli",
)


def imported_rooms(source: str) -> list[tuple[int, str]]:
    """Line and room of every import from the package, those for type checkers and within functions too."""
    rooms = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "diffadapt":
                names = [f"diffadapt.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inside = name.partition(".")
            room = inside.split(".")[0]
            if package == "diffadapt" and room in ORDER:
                rooms.append((node.lineno, room))
    return rooms


def imports_upward(source: str, room: str) -> list[str]:
    """The imports of a module of `room` that point to a room above it."""
    height = ORDER.index(room)
    return [
        f"line {line} imports {other}"
        for line, other in imported_rooms(source)
        if ORDER.index(other) > height
    ]


def test_every_import_points_down():
    upward = {}
    for room in ORDER:
        for path in (PACKAGE / room).rglob("*.py"):
            problems = imports_upward(path.read_text(encoding="utf-8"), room)
            if problems:
                upward[str(path.relative_to(PACKAGE))] = problems
    assert upward == {}


def test_nothing_lies_outside_the_rooms():
    top = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}
    assert top == {*ORDER, "__init__.py", "__main__.py"}


@pytest.mark.parametrize(
    "line",
    [
        "from diffadapt.training.loop import TrainState",
        "import diffadapt.training.loop",
        "from diffadapt import training",
        "def late():\n    from diffadapt.cli import main",
        "if TYPE_CHECKING:\n    from diffadapt.evaluation.record import Score",
    ],
)
def test_an_import_upward_would_be_found(line):
    assert len(imports_upward(line, "data")) == 1


@pytest.mark.parametrize(
    "line", ["from diffadapt.common import images", "import diffadapt as da", "import torch"]
)
def test_imports_downward_are_not(line):
    assert imports_upward(line, "data") == []
