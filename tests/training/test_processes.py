"""Two real processes equal one at the same global batch; data sizes that do not divide included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.pipelines import write_pictures
from helpers.tiny_bases import tiny_base
from helpers.torchrun import ROOT, run_torchrun
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "helpers" / "run_sgd.py"


FAMILIES = ("sd", "sd3", "qwen_image")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders with what one process, and what two with half of half the batch, have written."""
    place = tmp_path_factory.mktemp("runs")
    pictures = write_pictures(place / "mine", 5)
    bases = [tiny_base(family, tmp_path_factory) for family in FAMILIES]
    folders = [place / "one", place / "two"]
    for folder in folders:
        folder.mkdir()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, *map(str, (SCRIPT, pictures, folders[0], 4, 1, *bases))]
    subprocess.run(command, env=environment, check=True)
    run_torchrun(SCRIPT, pictures, folders[1], 1, 2, *bases)
    return folders


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_two_processes_with_accumulation_equal_one_at_the_same_global_batch(runs, family):
    one, two = (load_file(folder / f"{family}.safetensors") for folder in runs)
    assert (int(one.pop("processes")), int(two.pop("processes"))) == (1, 2)
    assert one.keys() == two.keys()
    assert torch.allclose(one.pop("losses"), two.pop("losses"), rtol=0, atol=1e-6)
    for name, value in one.items():
        scale = value.abs().max().clamp(min=1e-3 if name.startswith("weight") else 1e-12)
        assert (value - two[name]).abs().max() <= 1e-6 * scale + 1e-9, name
