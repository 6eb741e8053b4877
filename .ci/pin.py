"""Write constraints.txt: the versions that pip chooses today, within the ranges of pyproject.toml.

    python .ci/pin.py python3.10 python3.11

Run it with one interpreter per supported set, oldest first; nothing is installed. Then run the tests with the
new file (`.ci/run`) before committing it: it is called the tested set.
"""

import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = f"{ROOT}[test,pretrain,heif]"
# torch chooses these by platform; a Mac or a machine with another CUDA has others.
CHOSEN_BY_TORCH = ("nvidia-", "cuda-", "triton")

HEADER = """\
# The tested set of packages: versions with which the test suite passed.
# Use: python -m pip install -e . -c constraints.txt
# Written by `python .ci/pin.py {interpreters}` on {date}. pyproject.toml holds the ranges.
"""


def resolve(interpreter: str) -> tuple[str, dict[str, str]]:
    """Ask pip what it would install into an empty environment.

    Args:
        interpreter: a Python, such as "python3.11".

    Returns:
        Its version as "3.11", and package name -> version.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        subprocess.run([interpreter, "-m", "venv", environment], check=True)
        python = environment / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
        report = Path(folder) / "report.json"
        command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--report", report, PACKAGES]
        subprocess.run(command, check=True)
        resolution = json.loads(report.read_text(encoding="utf-8"))
    versions = {}
    for package in resolution["install"]:
        name = package["metadata"]["name"].lower().replace("_", "-")
        if name != "diffadapt" and not name.startswith(CHOSEN_BY_TORCH):
            versions[name] = package["metadata"]["version"]
    return resolution["environment"]["python_version"], versions


def lines(sets: dict[str, dict[str, str]]) -> list[str]:
    """One pin per package, or one per Python where they differ.

    Args:
        sets: Python version -> package name -> version, oldest Python first. The last set holds for all
            later Pythons too.

    Returns:
        Lines of a constraints file.
    """
    pythons = list(sets)
    names = sorted(set().union(*sets.values()))
    pins = []
    for name in names:
        versions = [sets[python].get(name) for python in pythons]
        if len(set(versions)) == 1:
            pins.append(f"{name}=={versions[0]}")
            continue
        for python, version in zip(pythons, versions, strict=True):
            relation = ">=" if python == pythons[-1] else "=="
            if version is not None:
                pins.append(f'{name}=={version} ; python_version {relation} "{python}"')
    return pins


def main(interpreters: list[str]) -> None:
    if not interpreters:
        sys.exit(__doc__)
    sets = {}
    for interpreter in interpreters:
        python, versions = resolve(interpreter)
        sets[python] = versions
    header = HEADER.format(
        interpreters=" ".join(Path(interpreter).name for interpreter in interpreters),
        date=datetime.now(timezone.utc).date().isoformat(),
    )
    text = header + "\n".join(lines(sets)) + "\n"
    (ROOT / "constraints.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
