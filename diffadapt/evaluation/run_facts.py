"""What a record says of the run that made it."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState

PACKAGE = Path(__file__).parents[1]
LIBRARIES = (
    "diffadapt",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "torchmetrics",
    "torch-fidelity",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str]:
    """Of Python and of every library that a number can depend on; of diffadapt the commit too."""
    found = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    commit = git_commit(PACKAGE)
    if commit is not None:
        found["diffadapt commit"] = commit
    return found


def git_commit(package: Path) -> str | None:
    """The commit of the repository whose top folder holds a package, marked where its files differ from it.

    None for an installed package: the repository around its environment, if there is one, is another's.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != package.parent.resolve():
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", str(package))
    return f"{commit} with changes" if commit and changes else commit


def _git(folder: Path, *command: str) -> str | None:
    """What git prints; None where there is no git, or it refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, encoding="utf-8", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def run_facts(start: float) -> dict[str, object]:
    """Seconds since `start` (of `time.perf_counter`), this process's device, the number of processes."""
    state = PartialState()
    seconds = round(time.perf_counter() - start, 1)
    return {"seconds": seconds, "device": str(state.device), "processes": state.num_processes}
