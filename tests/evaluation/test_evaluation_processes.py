"""Two real processes score as one does: whole batches each, merged in the set's order."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import run_evaluation
from image_files import random_image, write_images

from diffadapt.evaluation.record import read_record

ROOT = Path(__file__).parents[2]


def on_two_processes(*arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": ":".join(paths),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command = [*torchrun, run_evaluation.__file__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_equal_one(tmp_path):
    generated, real = write_images(tmp_path / "a", 19), write_images(tmp_path / "real", 23, first=50)
    random_image(3, (30, 20)).save(generated / "image-007.png")
    (generated / "image-011.png").write_text("no image")
    run_evaluation.score(generated, real, tmp_path / "one.json")
    on_two_processes(generated, real, tmp_path / "two.json")
    one, two = read_record(tmp_path / "one.json"), read_record(tmp_path / "two.json")
    assert (one.settings["processes"], two.settings["processes"]) == (1, 2)
    assert [row.name for row in two.images] == [row.name for row in one.images]
    assert len(one.images) == 18
    assert two.sets == one.sets
    for first, second in zip(one.scores, two.scores, strict=True):
        assert (first.name, first.identity) == (second.name, second.identity)
        assert second.value == pytest.approx(first.value, rel=1e-6, abs=1e-9)
