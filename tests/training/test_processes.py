"""Two real processes equal one at the same global batch; data sizes that do not divide included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.torchrun import ROOT, run_torchrun
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "helpers" / "run_sgd.py"


@pytest.mark.slow
def test_two_processes_equal_one_at_the_same_global_batch(tmp_path):
    base, pictures = tiny_sd_pipeline(tmp_path / "base", vae="kl"), write_pictures(tmp_path / "mine", 5)
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, *map(str, (SCRIPT, base, pictures, files[0], 4))]
    subprocess.run(command, env=environment, check=True)
    run_torchrun(SCRIPT, base, pictures, files[1], 2)
    one, two = map(load_file, files)
    assert (int(one.pop("processes")), int(two.pop("processes"))) == (1, 2)
    assert one.keys() == two.keys()
    assert torch.allclose(one.pop("losses"), two.pop("losses"), rtol=0, atol=1e-6)
    for name, value in one.items():
        scale = value.abs().max().clamp(min=1e-3 if name.startswith("weight") else 1e-12)
        assert (value - two[name]).abs().max() <= 1e-6 * scale + 1e-9, name
