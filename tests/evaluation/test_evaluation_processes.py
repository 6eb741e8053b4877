"""Two real processes score as one does: whole batches each, merged in the set's order."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from image_files import random_image, write_images

from diffadapt.evaluation.record import read_record

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "eval" / "image_quality.py"


def scores(launcher, generated, real, output):
    arguments = [
        "--generated", generated, "--reference", real, "--extractor", "toy_extractor:Toy", "--allow_small",
        "--metrics", "fid,kid,precision_recall,vendi", "--no_intervals", "--no_cache", "--skip_bad",
        "--feature_batch_size", 4, "--output", output,
    ]  # fmt: skip
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths),
    }  # fmt: skip
    done = subprocess.run(
        [*launcher, SCRIPT, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return read_record(output)


def test_two_processes_equal_one(tmp_path):
    generated, real = write_images(tmp_path / "a", 19), write_images(tmp_path / "real", 23, first=50)
    random_image(3, (30, 20)).save(generated / "image-007.png")
    (generated / "image-011.png").write_text("no image")
    one = scores([sys.executable], generated, real, tmp_path / "one.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    two = scores(torchrun, generated, real, tmp_path / "two.json")
    assert (one.settings["processes"], two.settings["processes"]) == (1, 2)
    assert [row.name for row in two.images] == [row.name for row in one.images]
    assert len(one.images) == 18
    assert two.sets == one.sets
    for first, second in zip(one.scores, two.scores, strict=True):
        assert (first.name, first.identity) == (second.name, second.identity)
        assert second.value == pytest.approx(first.value, rel=1e-6, abs=1e-9)
