"""Versions, commit, device and duration of an evaluation, for its record."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

from accelerate import PartialState

import diffadapt as da

PACKAGE = Path(__file__).parents[1]
LIBRARIES = (
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
    """Versions of Python and of every library that a score can depend on, and diffadapt's commit."""
    known_versions = {"python": platform.python_version(), "diffadapt": da.__version__}
    for name in LIBRARIES:
        known_versions[name] = version(name)
    commit = git_commit(PACKAGE)
    if commit is not None:
        known_versions["diffadapt commit"] = commit
    return known_versions


def git_commit(package: Path) -> str | None:
    """The commit of the repository whose top folder holds a package, marked where its files differ from it.

    None for an installed package: a repository around its environment is another project's.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != package.parent.resolve():
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", str(package))  # files of the package alone
    return f"{commit} with changes" if commit and changes else commit


def run_facts(start: float) -> dict[str, object]:
    """Seconds since `start` (of `time.perf_counter`), this process's device, the number of processes."""
    state = PartialState()
    seconds = round(time.perf_counter() - start, 1)
    return {"seconds": seconds, "device": str(state.device), "processes": state.num_processes}


def _git(folder: Path, *command: str) -> str | None:
    """The output of git; None where there is no git, or it fails."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, encoding="utf-8", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
