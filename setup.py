"""The packages of the wheel: `diffadapt`, and `train_scripts/` in it as `diffadapt.scripts`.

So `accelerate launch -m diffadapt.scripts.dreambooth` works where only the wheel is installed. All else is in
pyproject.toml.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["diffadapt*"]), "diffadapt.scripts"],
    package_dir={"diffadapt.scripts": "train_scripts"},
)
