"""Two real processes equal one at the same global batch; data sizes that do not divide included."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from pipelines import tiny_sd_pipeline, write_pictures
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("run_sgd.py")
ROOT = SCRIPT.parents[2]


def _run(launcher, *arguments):
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": ":".join(paths),
    }
    done = subprocess.run(
        [*launcher, str(SCRIPT), *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(arguments[2])


def test_two_processes_equal_one_at_the_same_global_batch(tmp_path):
    base, pictures = tiny_sd_pipeline(tmp_path / "base", vae="kl"), write_pictures(tmp_path / "mine", 5)
    one = _run([sys.executable], base, pictures, tmp_path / "one.safetensors", 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    two = _run(torchrun, base, pictures, tmp_path / "two.safetensors", 2)
    assert (int(one.pop("processes")), int(two.pop("processes"))) == (1, 2)
    assert one.keys() == two.keys()
    assert torch.allclose(one.pop("losses"), two.pop("losses"), rtol=0, atol=1e-6)
    for name, value in one.items():
        scale = value.abs().max().clamp(min=1e-3 if name.startswith("weight") else 1e-12)
        assert (value - two[name]).abs().max() <= 1e-6 * scale + 1e-9, name
