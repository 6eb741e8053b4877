"""Models and images shipped with the package, so that everything runs without a download."""

from pathlib import Path

from diffadapt.common.messages import did_you_mean

ROOT = Path(__file__).parent
CONTENTS = ("README.md", "*.png", "*.webp")  # a folder with one of these is an asset


def names() -> list[str]:
    """The names of all models and data sets here, as `embedded` takes them, sorted."""
    folders = set()
    for pattern in CONTENTS:
        for path in ROOT.rglob(pattern):
            folders.add(path.parent.relative_to(ROOT).as_posix())
    return sorted(folders - {"."})


def embedded(name: str) -> Path:
    """The folder of a model or data set shipped with the package, such as `emoji` or `subjects/cat`.

    Raises:
        ValueError: there is none of that name; the message suggests the nearest and lists all.
    """
    valid_names = names()
    if name in valid_names:
        return ROOT / name
    raise ValueError(f"nothing called {name!r} is embedded{did_you_mean(name, valid_names)}")
