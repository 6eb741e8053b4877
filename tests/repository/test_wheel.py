"""What is installed: the wheel holds the package and the training scripts, and they start from it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPTS = ("dreambooth", "style_transfer", "class_conditional")
pytest.importorskip("setuptools", minversion="77", reason="builds a wheel without a download")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the sources: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    for name in ("diffadapt", "train_scripts"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "-w", folder, sources], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_and_the_scripts_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
    package = {str(path.relative_to(ROOT).as_posix()) for path in (ROOT / "diffadapt").rglob("*.py")}
    scripts = {f"diffadapt/scripts/{name}.py" for name in ("__init__", *SCRIPTS)}
    assert modules == package | scripts


def test_type_checkers_are_told_that_the_package_is_annotated(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert "diffadapt/py.typed" in archive.namelist()


def test_an_installed_script_starts_anywhere_and_names_its_module(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    work = tmp_path / "work"
    work.mkdir()
    program = (
        "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); "
        "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", program, tmp_path / "installed", "diffadapt.scripts.dreambooth"]
    done = subprocess.run(
        [*command, "--pretrained_model_name_or_path", "base"], cwd=work, capture_output=True
    )
    errors = done.stderr.decode()
    assert done.returncode == 2, errors
    assert "accelerate launch -m diffadapt.scripts.dreambooth --adapter flora" in errors
    shown = subprocess.run([*command, "--help"], cwd=work, capture_output=True)
    assert shown.returncode == 0, shown.stderr.decode()
    assert b"--instance_data_dir" in shown.stdout
