"""Models and images shipped with the package, so that everything runs without a download."""

from pathlib import Path

from diffadapt.common.messages import did_you_mean

ROOT = Path(__file__).parent


def names() -> list[str]:
    """Every folder here that holds a model card or images, as `embedded` takes it."""
    marks = [path for mark in ("README.md", "*.png", "*.webp") for path in ROOT.rglob(mark)]
    return sorted({mark.parent.relative_to(ROOT).as_posix() for mark in marks} - {"."})


def embedded(name: str) -> Path:
    """The folder of a model or data set shipped with the package, such as `emoji` or `subjects/cat`.

    Raises:
        ValueError: nothing of that name is shipped; the message names the nearest and lists all.
    """
    known = names()
    if name in known:
        return ROOT / name
    raise ValueError(f"nothing called {name!r} is embedded{did_you_mean(name, known)}")
