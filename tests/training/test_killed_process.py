"""One process that dies ends the others with a message; what was saved before is whole."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.torchrun import ROOT, torchrun

from diffadapt.training.checkpoint.checkpoint_files import find_checkpoint

WAIT = 240  # seconds, on a slow machine


def _workers(launcher):
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text(encoding="utf-8").split()
    return [int(child) for child in children]


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_a_message(tmp_path):
    base, pictures = tiny_sd_pipeline(tmp_path / "base"), write_pictures(tmp_path / "mine", 3)
    launcher = torchrun(
        ROOT / "train_scripts" / "dreambooth.py",
        *("--pretrained_model_name_or_path", base, "--instance_data_dir", pictures),
        *("--instance_prompt", "a sks dog", "--output_dir", tmp_path / "out", "--num_validation_images", 0),
        *("--max_train_steps", 100_000, "--checkpointing_steps", 2, "--num_threads", 1),
        *("--train_batch_size", 1, "--export_formats", "none", "--checkpoints_total_limit", 3),
        stdout=subprocess.DEVNULL,
    )
    try:
        started = time.monotonic()
        while not list((tmp_path / "out").glob("checkpoint-*")) and time.monotonic() - started < WAIT:
            assert launcher.poll() is None, launcher.stderr.read()[-3000:]
            time.sleep(0.2)
        os.kill(_workers(launcher)[1], signal.SIGKILL)
        _, said = launcher.communicate(timeout=WAIT)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    assert "SIGKILL" in said  # torchrun names the process and the signal
    assert find_checkpoint("latest", tmp_path / "out").name.startswith("checkpoint-")
