"""Signals to real processes: what containers, batch systems and terminals send to a run and its launcher."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import FOLDER, runner

from diffadapt.common import launcher
from diffadapt.training.checkpoint.checkpoint_files import find_checkpoint

pytestmark = pytest.mark.slow

ROOT = FOLDER.parent
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_config.yaml"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"]
WAIT = 240  # seconds, on a busy machine


def options(tmp_path):
    values = {
        "pretrained_model_name_or_path": tiny_sd_pipeline(tmp_path / "base"),
        "instance_data_dir": write_pictures(tmp_path / "mine", 2),
        "instance_prompt": "a sks dog",
        "output_dir": tmp_path / "out",
        "num_validation_images": 0,
        "max_train_steps": 100_000,
        "mixed_precision": "no",
        "num_threads": 1,
        "export_formats": "none",
    }
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def start(launcher_arguments, *script_options, **settings):
    """Starts dreambooth.py and waits until it has made two steps."""
    command = [sys.executable, *launcher_arguments, FOLDER / "dreambooth.py", *script_options]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **settings,
    )
    log = script_options[script_options.index("--output_dir") + 1] + "/log.jsonl"
    deadline = time.monotonic() + WAIT
    while not (os.path.exists(log) and os.path.getsize(log) > 200):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[1].decode()[-3000:])
        time.sleep(0.1)
    return process


def errors_until_all_ended(process):
    """Standard error to its end, which comes when the last process that holds it has ended."""
    try:
        _, errors = process.communicate(timeout=WAIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return errors.decode()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM between processes")
@pytest.mark.parametrize(
    ("started_by", "number", "to_all", "exit_code"),
    [
        (ACCELERATE, signal.SIGTERM, False, -signal.SIGTERM),
        (ACCELERATE, signal.SIGKILL, False, -signal.SIGKILL),
        (ACCELERATE, signal.SIGINT, True, -signal.SIGINT),  # a terminal's Ctrl-C reaches every process
        (TORCHRUN, signal.SIGTERM, False, 1),
    ],
    ids=["accelerate-term", "accelerate-kill", "accelerate-ctrl-c", "torchrun-term"],
)
def test_training_ends_with_a_checkpoint_when_its_launcher_is_stopped(
    tmp_path, monkeypatch, started_by, number, to_all, exit_code
):
    arguments = options(tmp_path)
    process = start(started_by, *arguments)
    if to_all:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    errors = errors_until_all_ended(process)
    said = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"{said}: stops after this step and saves a checkpoint" in errors
    assert process.returncode == exit_code, errors[-3000:]
    step = int(find_checkpoint("latest", tmp_path / "out").name.removeprefix("checkpoint-"))
    assert not (tmp_path / "out" / "run.json").exists()

    more = [*arguments, "--max_train_steps", step + 1, "--resume_from_checkpoint", "latest"]
    assert runner("dreambooth", monkeypatch)(*more) == 0


@pytest.mark.skipif(not os.path.exists("/proc"), reason="elsewhere the environment decides")
def test_a_shell_is_no_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as somebody may export for plain python
    shell = subprocess.Popen(["sh", "-c", "read line"], stdin=subprocess.PIPE)
    monkeypatch.setattr(os, "getppid", lambda: shell.pid)
    try:
        assert launcher.launcher_pid() is None
    finally:
        shell.communicate(b"end\n")
