"""Threads: all cores, unless a person said otherwise."""

from types import SimpleNamespace

import pytest
import torch

from diffadapt.training import session


@pytest.fixture
def threads(monkeypatch):
    """Runs `use_cores` on four cores. Returns the threads it set, None when it left them."""

    def call(environment, **options):
        for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        chosen = []
        monkeypatch.setattr(torch, "set_num_threads", chosen.append)
        monkeypatch.setattr(session, "available_cores", lambda: 4)
        session.use_cores(**options)
        return chosen[0] if chosen else None

    return call


def test_all_cores_are_used_and_shared_among_processes(threads):
    assert threads({}) == 4
    assert threads({}, processes=2) == 2


def test_the_single_thread_that_accelerate_launch_exports_is_nobody_s_wish(threads):
    assert threads({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}) == 4


def test_a_person_s_wish_is_followed(threads):
    assert threads({"OMP_NUM_THREADS": "3"}) is None
    assert threads({"OMP_NUM_THREADS": "1"}) is None
    assert threads({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}) is None
    assert threads({"OMP_NUM_THREADS": "3"}, num_threads=2) == 2


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
    assert session.weight_dtype(accelerator, wish) == expected
