"""What a record says of the code that made it."""

import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

import diffadapt as da
from diffadapt.evaluation import run_facts
from diffadapt.evaluation.run_facts import git_commit, versions


def git(folder, *command):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", *identity, *command], cwd=folder, check=True, capture_output=True, encoding="utf-8"
    )
    return done.stdout.strip()


def test_the_commit_is_of_the_packages_repository_alone_and_changes_are_told(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    assert git_commit(package) is None
    git(tmp_path, "init", "-q")
    (package / "a.py").write_text("a = 1\n", encoding="utf-8")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(package) == commit
    (package / "a.py").write_text("a = 2\n", encoding="utf-8")
    assert git_commit(package) == f"{commit} with changes"
    installed = tmp_path / "environment" / "site-packages" / "package"
    installed.mkdir(parents=True)
    assert git_commit(installed) is None


def test_versions_are_known_in_a_checkout_that_is_not_installed(monkeypatch):
    def version_of_installed(name):
        if name == "diffadapt":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(run_facts, "version", version_of_installed)
    recorded = versions()
    assert recorded["diffadapt"] == da.__version__
    assert recorded["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert recorded["torch-fidelity"] == version("torch-fidelity")
