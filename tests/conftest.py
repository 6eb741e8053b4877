"""What every test relies on: no network, one seed, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one worker per core


# Jobs that a script starts in the background ignore Ctrl-C; these tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # one test's precision is not the next one's
    GradientState._reset_state()


def pytest_collection_modifyitems(items):
    """Every test that is not marked as slow belongs to the quick loop."""
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.quick)
