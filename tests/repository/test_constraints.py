"""constraints.txt pins what pyproject.toml asks for, within its ranges, on every supported Python."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def direct_requirements() -> list[Requirement]:
    """Dependencies and the extras that the tests install, from the quoted lines of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = text.split("dependencies = [")[1].split("[project.scripts]")[0]
    quoted = re.findall(r'^ *(?:\w+ = \[)?"([A-Za-z][^"]*>=[^"]*)"', project, re.M)
    return [Requirement(line) for line in quoted]


def pins(python: str) -> dict[str, str]:
    """Package name -> pinned version on a Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    versions = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in versions, f"{name} is pinned twice for Python {python}"
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            versions[name] = specifier.version
    return versions


def test_the_requirements_are_found():
    names = {requirement.name for requirement in direct_requirements()}
    assert {"torch", "transformers", "peft", "pytest", "scikit-learn", "prodigyopt"} <= names


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_range(python):
    versions = pins(python)
    for requirement in direct_requirements():
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (requirement, version)


def test_platform_packages_of_torch_are_not_pinned():
    for python in PYTHONS:
        assert [name for name in pins(python) if name.startswith(("nvidia-", "cuda-", "triton"))] == []
