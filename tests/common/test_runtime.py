"""Threads: all idle cores, unless a person said otherwise."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffadapt.common import launcher, runtime


@pytest.fixture
def threads(monkeypatch):
    """Runs `set_cpu_threads` on four cores. Returns the threads it set, None when it left them."""

    def call(environment, *, busy=0.0, **options):
        for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        chosen = []
        monkeypatch.setattr(torch, "set_num_threads", chosen.append)
        monkeypatch.setattr(runtime, "available_cores", lambda: 4)
        monkeypatch.setattr(runtime, "busy_cores", lambda: busy)
        runtime.set_cpu_threads(**options)
        return chosen[0] if chosen else None

    return call


def test_all_idle_cores_are_used_and_shared_among_processes(threads):
    assert threads({}) == 4
    assert threads({}, processes=2) == 2


def test_the_single_thread_that_accelerate_launch_exports_is_nobody_s_wish(threads):
    assert threads({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}) == 4


def test_a_person_s_wish_is_followed(threads):
    assert threads({"OMP_NUM_THREADS": "3"}) is None
    assert threads({"OMP_NUM_THREADS": "1"}) is None
    assert threads({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}) is None
    assert threads({"OMP_NUM_THREADS": "3"}, num_threads=2) == 2


def test_cores_that_other_programs_use_are_left_to_them(threads):
    assert threads({}, busy=0.3) == 4
    assert threads({}, busy=1.2) == 3
    assert threads({}, busy=4.0) == 1
    assert threads({}, busy=3.0, processes=2) == 2  # the other process is what is busy


@pytest.mark.parametrize("given", [b"OMP_NUM_THREADS=1\0", b""])
def test_a_single_thread_that_a_person_gave_the_launcher_is_kept(threads, monkeypatch, tmp_path, given):
    launched = {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    proc = tmp_path / "7"
    proc.mkdir()
    (proc / "environ").write_bytes(b"PATH=/bin\0" + given)
    (proc / "cmdline").write_bytes(b"python\0accelerate\0launch\0")
    monkeypatch.setattr(launcher, "LAUNCHER", 7)
    monkeypatch.setattr(launcher, "PROCESSES", tmp_path)
    assert threads(launched) == (None if given else 4)
    (proc / "cmdline").write_bytes(b"accelerate\0launch\0--num_cpu_threads_per_process\x001\0")
    assert threads(launched) is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux says which cores are busy")
def test_a_busy_core_is_seen():
    program = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as busy:
        busy.stdout.read(1)
        try:
            assert 0.3 < runtime.busy_cores(0.5) <= runtime.available_cores()
        finally:
            busy.kill()


def test_microsteps_of_the_launcher(monkeypatch):
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", raising=False)
    assert runtime.launcher_accumulation() == 1
    for text, steps in (("4", 4), ("auto", 1)):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", text)
        assert runtime.launcher_accumulation() == steps
    for text in ("0", "-1", "many"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", text)
        with pytest.raises(ValueError, match="must be at least 1, got"):
            runtime.launcher_accumulation()


@pytest.mark.parametrize(
    ("wish", "mixed", "expected"),
    [
        (None, "bf16", torch.float32),  # on a CPU half only costs digits
        ("bf16", "bf16", torch.bfloat16),
        ("fp16", "no", torch.float16),
        ("fp32", "bf16", torch.float32),
    ],
)
def test_the_precision_of_the_base_is_the_wished_one(wish, mixed, expected):
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision=mixed)
    assert runtime.weight_dtype(accelerator, wish) == expected
